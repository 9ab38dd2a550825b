"""Writes the results of a job: what a line holds, and a file that is there whole or not at all.

It does not gather results from ranks and knows nothing of models.
"""

import contextlib
import json
import math
import os
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ds_moe_ep.errors import InputError

__all__ = [
    "GenerateResult",
    "ScoreResult",
    "Result",
    "check_writable",
    "remove_unfinished",
    "write_lines",
    "write_results",
]


@dataclass(frozen=True)
class GenerateResult:
    """What a model wrote after one prompt.

    Attributes:
        id: The prompt's id.
        prompt: The prompt's text, or None if it was given as token ids; the line then has no key
            for it.
        token_ids: The new tokens, without the prompt's.
        completion: Their text, or None (null in the file) for a model without a tokenizer.
        finish_reason: "stop" after an end-of-sequence token, "length" at the limit of new tokens.
    """

    id: str
    prompt: str | None
    token_ids: tuple[int, ...]
    completion: str | None
    finish_reason: Literal["stop", "length"]

    def to_json_line(self) -> str:
        """Returns the result as a line of JSON, with its line end."""
        record: dict[str, Any] = {"id": self.id}
        if self.prompt is not None:
            record["prompt"] = self.prompt
        record["token_ids"] = self.token_ids
        record["completion"] = self.completion
        record["finish_reason"] = self.finish_reason
        return _json_line(record)


@dataclass(frozen=True)
class ScoreResult:
    """How likely a model finds one prompt.

    Attributes:
        id: The prompt's id.
        num_tokens: Number of tokens of the prompt.
        logprob: Sum of `token_logprobs`.
        token_logprobs: ln P(token | tokens before it) of every token but the first, which has
            none before it: num_tokens - 1 numbers.
    """

    id: str
    num_tokens: int
    logprob: float
    token_logprobs: tuple[float, ...]

    def to_json_line(self) -> str:
        """Returns the result as a line of JSON, with its line end.

        JSON has no infinity and no NaN: a number that is not finite becomes null.
        """
        return _json_line(
            {
                "id": self.id,
                "num_tokens": self.num_tokens,
                "logprob": _finite(self.logprob),
                "token_logprobs": [_finite(value) for value in self.token_logprobs],
            }
        )


Result = GenerateResult | ScoreResult


def check_writable(path: Path) -> None:
    """Finds out whether `write_results` could write this file, without a trace in the folder.

    Raises:
        InputError: It could not; said before any work is done for it.
    """
    target = _target(path)
    folder = target.parent
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "not a regular file"
        raise InputError(f"{path}: is {kind}. Name a file for the results.")
    if not os.path.exists(folder):
        command = shlex.join(["mkdir", "-p", str(folder)])
        raise InputError(f"{path}: the folder {folder} does not exist. Make it: {command}")
    if not os.path.isdir(folder):
        raise InputError(f"{path}: {folder} is a file, not a folder. Choose another folder.")
    try:
        descriptor, temporary = _open_temporary(target)
        os.close(descriptor)
        temporary.unlink(missing_ok=True)  # a job that starts just now may have removed it
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Choose a folder that you may write to."
        ) from None


def remove_unfinished(path: Path) -> None:
    """Removes what writers of this file have left beside it that were killed.

    Args:
        path: The file, which nobody else may be writing now; a job has the lock of its journals.
    """
    target = _target(path)
    left = re.compile(rf"\.{re.escape(target.name)}\.\d+\.tmp")
    with contextlib.suppress(OSError):  # what stays does no harm
        for each in target.parent.iterdir():
            if left.fullmatch(each.name):
                each.unlink()


def write_results(path: Path, results: Sequence[Result]) -> None:
    """Writes results as JSONL, in their order, as `write_lines` does.

    Args:
        path: The file; `check_writable` says beforehand whether it can be written.
        results: One a line.
    """
    write_lines(path, (result.to_json_line() for result in results))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, replacing what was there in one step.

    A reader sees the old file or all of the new one, also after a crash. A link is followed: the
    file it points to is replaced.

    Args:
        path: The file, in a folder that is there.
        lines: Its lines, each with its end.

    Raises:
        OSError: The disk is full, say; the old file is untouched and nothing is left behind.
    """
    target = _target(path)
    descriptor, temporary = _open_temporary(target)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _open_temporary(target: Path) -> tuple[int, Path]:
    """Creates a new file beside `target`, with the mode the umask gives to any new file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # One that a killed process with this id left behind is used again.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return os.open(temporary, flags, 0o666), temporary


def _sync_folder(folder: Path) -> None:
    """Makes the new name survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
