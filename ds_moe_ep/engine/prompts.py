"""Reads the input file of a job into prompts and refuses what no rank should ever see.

It knows nothing of models: whether a prompt fits the context or the vocabulary is checked later.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import InputError, nearest

__all__ = ["Prompt", "read_prompts"]

_JSONL_ENDINGS = (".jsonl", ".json", ".ndjson")
_KEYS = ("id", "prompt", "prompt_token_ids")
_EXAMPLE = '{"id": "a", "prompt": "Once upon a time"}'


@dataclass(frozen=True)
class Prompt:
    """One prompt: either `text` or `token_ids` is set."""

    id: str
    text: str | None
    token_ids: tuple[int, ...] | None


def read_prompts(path: Path) -> list[Prompt]:
    """Reads a file of prompts; the file's ending says what is in it.

    `.jsonl`, `.json` and `.ndjson` hold a JSON object a line, `{"id": ..., "prompt": "text"}` or
    `{"id": ..., "prompt_token_ids": [1, 2]}`. An id is a string; an integer stands for its digits.
    Every other file is plain text, a prompt a line, taken as it stands but for the line's end.
    Blank lines are skipped in both. A prompt without an id gets its index among the prompts, from
    "0" on.

    Args:
        path: The file, in UTF-8.

    Returns:
        The prompts in the order of the file; at least one, and no two with the same id.

    Raises:
        InputError: The file cannot be read or a line cannot be used; with the line's number.
    """
    parse = _from_json if path.suffix.lower() in _JSONL_ENDINGS else _from_text
    prompts: list[Prompt] = []
    line_of_id: dict[str, str] = {}
    for where, line in _lines(path):
        prompt = parse(line, where, index=len(prompts))
        if prompt.id in line_of_id:
            raise InputError(
                f'{where}: id "{prompt.id}" is already that of {line_of_id[prompt.id]}. Give every '
                "prompt an id of its own (a prompt without one gets its index, from 0 on)."
            )
        line_of_id[prompt.id] = where
        prompts.append(prompt)
    if not prompts:
        raise InputError(f"{path}: no prompt in this file. Write one a line.")
    return prompts


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yields `file:line` and the text of every line that is not blank."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}). Name a file of prompts with --input."
        ) from None
    # Not str.splitlines: U+2028 and its like may stand in a prompt.
    for number, raw in enumerate(content.split(b"\n"), start=1):
        where = f"{path}:{number}"
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not "
                "UTF-8. Convert the file, for example: iconv -f latin1 -t utf-8."
            ) from None
        if line.strip():
            yield where, line


def _from_text(line: str, where: str, index: int) -> Prompt:
    return Prompt(id=str(index), text=line, token_ids=None)


def _from_json(line: str, where: str, index: int) -> Prompt:
    record = _parse_object(line, where)
    for key in record.keys() - set(_KEYS):
        close = nearest(key, _KEYS)
        hint = f'Did you mean "{close}"? ' if close else ""
        raise InputError(f'{where}: unknown key "{key}". {hint}Known: {", ".join(_KEYS)}.')
    given = [key for key in ("prompt", "prompt_token_ids") if key in record]
    if len(given) != 1:
        problem = "both prompt and prompt_token_ids" if given else "no prompt"
        raise InputError(
            f"{where}: {problem} given. Give either prompt (text) or prompt_token_ids (a list)."
        )
    return Prompt(
        id=_check_id(record["id"], where) if "id" in record else str(index),
        text=_check_text(record["prompt"], where) if "prompt" in record else None,
        token_ids=(
            _check_token_ids(record["prompt_token_ids"], where)
            if "prompt_token_ids" in record
            else None
        ),
    )


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}:{error.colno}: not JSON ({error.msg}). Write an object a line: {_EXAMPLE}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise InputError(f"{where}: JSON that cannot be read ({error}).") from None
    if not isinstance(record, dict):
        raise InputError(
            f"{where}: {_shown(record)} is not an object. Write an object a line: {_EXAMPLE}"
        )
    return record


def _check_id(value: Any, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise InputError(f"{where}: id={_shown(value)} is neither a string nor an integer.")
    return _check_characters("id", value, where)


def _check_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise InputError(
            f"{where}: prompt={_shown(value)} is not a string. Token ids go into prompt_token_ids."
        )
    if not value:
        raise InputError(f"{where}: prompt is empty; a model needs at least one token to start.")
    return _check_characters("prompt", value, where)


def _check_characters(key: str, value: str, where: str) -> str:
    """Refuses half of a surrogate pair, which JSON can spell and UTF-8 and tokenizers cannot."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {key} holds {_shown(value[error.start])} without its other half; this is no "
            "character. Write it as UTF-8 text."
        ) from None
    return value


def _check_token_ids(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InputError(f"{where}: prompt_token_ids={_shown(value)} is not a list of integers.")
    if not value:
        raise InputError(
            f"{where}: prompt_token_ids is empty; a model needs at least one token to start."
        )
    for position, token_id in enumerate(value):
        if not isinstance(token_id, int) or isinstance(token_id, bool) or token_id < 0:
            raise InputError(
                f"{where}: prompt_token_ids[{position}]={_shown(token_id)} is not a token id. "
                "Token ids are integers from 0 to the model's vocab_size - 1."
            )
    return tuple(value)


def _shown(value: Any) -> str:
    """Returns a value as the user spelt it, cut short."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
