"""ds_moe_ep.json: what a converted Megatron checkpoint was made from, and what its files are.

Megatron does not read it. It is what brings back the same Hugging Face files, and what the bytes of
the checkpoint are compared with.
"""

from __future__ import annotations

import json
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, ValidationError

from ds_moe_ep.checkpoint.manifest import (
    RECORD_JSON,
    FileEntry,
    SourceSection,
    is_file_name,
    refuse_newer,
)
from ds_moe_ep.config.strict import Strict, faults
from ds_moe_ep.errors import CheckpointError

__all__ = ["Record", "read_record"]


def _relative(name: str) -> str:
    if not all(map(is_file_name, name.split("/"))):
        raise ValueError("is not the path of a file in this folder")
    return str(PurePosixPath(name))


_VERSION = 1


class Record(Strict):
    """The content of ds_moe_ep.json; `files` names every file of the folder but itself."""

    format: Literal["ds_moe_ep Megatron checkpoint"] = "ds_moe_ep Megatron checkpoint"
    version: Literal[1] = 1
    target_spec: Literal["local", "te"]
    source: SourceSection
    files: dict[Annotated[str, AfterValidator(_relative)], FileEntry]

    def to_json(self) -> str:
        """Returns the text of the file."""
        return self.model_dump_json(indent=1) + "\n"


def read_record(folder: Path) -> Record | None:
    """Reads the record of a converted checkpoint; None where Megatron wrote the checkpoint.

    Raises:
        CheckpointError: It is corrupt, or a newer version wrote it.
    """
    path = folder / RECORD_JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        refuse_newer(path, content, _VERSION)
        return Record.model_validate(content)
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first, *_ = faults(Record, error)
        raise CheckpointError(f"{path}: {first}. {_AGAIN}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {_AGAIN}") from error


_AGAIN = (
    "Copy it again from its source, or remove it: the checkpoint then comes back with the same "
    "tensors, but in other files."
)
