"""Reads JSON strictly: an unknown key is refused, with the file, its place and the nearest name.

Which keys are known is said by subclasses of `Strict`, here and in other packages.
"""

import json
from pathlib import Path
from typing import Any, TypeGuard, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from ds_moe_ep.errors import ConfigError, nearest

__all__ = ["Strict", "faults", "parse", "parse_json", "read_json", "read_json_lines"]


class Strict(BaseModel):
    """A section of a file: exact types, known keys only, never changed after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True, strict=True)


Section = TypeVar("Section", bound=Strict)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        ConfigError: if the file cannot be read, is no JSON object, or says a key twice.
    """
    return parse_json(_read_text(path), path)


def read_json_lines(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the JSON object on each line of a file, with ``path:line`` for messages.

    Raises:
        ConfigError: if the file cannot be read, or a line is no JSON object or says a key twice.
    """
    lines = enumerate(_read_text(path).splitlines(), start=1)
    places = [(Path(f"{path}:{number}"), line) for number, line in lines if line.strip()]
    return [(place, parse_json(line, place)) for place, line in places]


def parse_json(text: str | bytes, source: Path) -> dict[str, Any]:
    """Return the JSON object in a text.

    Args:
        text: the text.
        source: where it was read, for messages.

    Raises:
        ConfigError: if it is no JSON object, or says a key twice.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})."
        ) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{source}: {error}.") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: a JSON object ({{...}}) is needed, found {_shown(content)}.")
    return content


def parse(section: type[Section], content: dict[str, Any], source: Path) -> Section:
    """Return the content of a file as the section it has to be.

    Args:
        section: what may stand in it.
        content: what `read_json` returned.
        source: the file, for messages.

    Raises:
        ConfigError: with every key or value at fault.
    """
    try:
        return section.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{source}: {'; '.join(faults(section, error))}.") from None


def faults(section: type[Strict], error: ValidationError) -> list[str]:
    """Return what is wrong, each with its place; of an unknown key also the nearest known one.

    Args:
        section: what was to be read.
        error: what `section.model_validate` raised.
    """
    return [_fault(section, detail) for detail in error.errors(include_url=False)]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}).") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} is there twice; keep one")
    return dict(pairs)


def _fault(section: type[Strict], detail: ErrorDetails) -> str:
    place = ".".join(str(step) for step in detail["loc"])
    if not place:  # no value is at fault by itself
        return detail["msg"]
    if detail["type"] == "missing":
        return f"{place} is missing"
    if detail["type"] != "extra_forbidden":
        return f"{place}={_shown(detail['input'])}: {detail['msg']}"
    key = str(detail["loc"][-1])
    known = _names(_section_at(section, detail["loc"][:-1]))
    if key in known:
        return f"{place} is there under both of its names; keep one"
    close = nearest(key, known)
    hint = f"did you mean {close!r}?" if close else f"known here: {', '.join(sorted(known))}"
    return f"unknown key {place!r} ({hint})"


def _section_at(section: type[Strict], steps: tuple[int | str, ...]) -> type[Strict]:
    """Return the section at a place, in lists and dictionaries of sections too."""
    for step in steps:
        for name, field in section.model_fields.items():
            if step in (name, field.alias):
                kinds = get_args(field.annotation) or (field.annotation,)
                section = next((kind for kind in kinds if _is_section(kind)), section)
    return section


def _is_section(kind: object) -> TypeGuard[type[Strict]]:
    # Of list[...] Python 3.10 says that it is a type.
    return isinstance(kind, type) and get_origin(kind) is None and issubclass(kind, Strict)


def _names(section: type[Strict]) -> set[str]:
    fields = section.model_fields
    return set(fields) | {field.alias for field in fields.values() if field.alias}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
