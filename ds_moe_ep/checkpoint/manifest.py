"""manifest.json: what an expert-sharded checkpoint consists of, and how its source was laid out.

The same schema writes it and reads it. Whether the files are as it says is checked elsewhere:
their sizes and headers in files.py, their bytes in convert.py.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ds_moe_ep.config.strict import Strict, faults
from ds_moe_ep.errors import CheckpointError

__all__ = [
    "INDEX_JSON",
    "MANIFEST_JSON",
    "MODEL_SAFETENSORS",
    "RECORD_JSON",
    "FileEntry",
    "Manifest",
    "PlanSection",
    "SourceFile",
    "SourceSection",
    "TensorEntry",
    "is_file_name",
    "read_manifest",
    "refuse_newer",
]

MANIFEST_JSON = "manifest.json"
RECORD_JSON = "ds_moe_ep.json"  # in place of it, beside a Megatron checkpoint
INDEX_JSON = "model.safetensors.index.json"
MODEL_SAFETENSORS = "model.safetensors"


def is_file_name(name: str) -> bool:
    """Returns whether a name is that of a file in the same folder, on every system."""
    return name.isprintable() and not set(name) & set("/\\:") and name not in ("", ".", "..")


def _file_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError("is not the name of a file in this folder")
    return name


FileName = Annotated[str, AfterValidator(_file_name)]


class FileEntry(Strict):
    """A file of the checkpoint."""

    num_bytes: NonNegativeInt
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class TensorEntry(Strict):
    """A tensor, and the files that hold it: one, or equal parts of dimension 0 in several."""

    dtype: str
    shape: list[NonNegativeInt]
    files: Annotated[list[FileName], Field(min_length=1)]


class SourceFile(Strict):
    """A weight file of the source: its metadata, and its tensors in the order of their bytes."""

    metadata: dict[str, str]
    tensors: list[str]


class SourceSection(Strict):
    """The Hugging Face directory that was converted.

    `files` is empty where the tensors are not those of its files, but of an upcycled model. `index`
    is what stands in its index file beside the weight map; null if it has no index file.
    """

    name: str
    files: dict[FileName, SourceFile]
    index: dict[str, Any] | None


class PlanSection(Strict):
    """The sizes of the `ParallelPlan` it was written for; it loads under any other."""

    ep_size: PositiveInt
    tp_size: PositiveInt
    pp_size: PositiveInt
    dp_size: PositiveInt


class Manifest(Strict):
    """The content of manifest.json; `files` names every file of the folder but itself."""

    format: Literal["ds_moe_ep expert-sharded checkpoint"] = "ds_moe_ep expert-sharded checkpoint"
    version: Literal[1] = 1
    source: SourceSection
    plan: PlanSection
    files: dict[FileName, FileEntry]
    tensors: dict[str, TensorEntry]

    @model_validator(mode="after")
    def _hangs_together(self) -> Manifest:
        held = {name for entry in self.tensors.values() for name in entry.files}
        if unknown := sorted(held - self.files.keys()):
            raise ValueError(f"tensors lie in {unknown[0]}, which is not among the files")
        listed = [key for file in self.source.files.values() for key in file.tensors]
        if self.source.files and sorted(listed) != sorted(self.tensors):
            raise ValueError("the tensors are not those of the source's files")
        if clash := sorted({MANIFEST_JSON, INDEX_JSON, *self.source.files} & self.files.keys()):
            raise ValueError(f"{clash[0]} cannot be a file of an expert-sharded checkpoint")
        return self

    def to_json(self) -> str:
        """Returns the text of the file."""
        return self.model_dump_json(indent=1) + "\n"


_FORMAT = Manifest.model_fields["format"].default
_VERSION = Manifest.model_fields["version"].default


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an expert-sharded checkpoint.

    Raises:
        CheckpointError: There is none, it is corrupt, or a newer version wrote it.
    """
    path = folder / MANIFEST_JSON
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(_why_no_manifest(folder)) from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error}). {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not the manifest of an expert-sharded checkpoint (format is not "
            f"{_FORMAT!r}). Name a folder that ds-moe-ep convert --to ep wrote."
        )
    refuse_newer(path, content, _VERSION)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first, *others = faults(Manifest, error)
        more = f" (and {len(others)} more faults)" if others else ""
        raise CheckpointError(f"{path}: {first}{more}. {_AGAIN}") from error


def refuse_newer(path: Path, content: object, known: int) -> None:
    """Refuses what a newer version of this package wrote.

    Args:
        path: For the message.
        content: What the file holds.
        known: The newest version of its format that is read here.

    Raises:
        CheckpointError: Its version is newer.
    """
    version = content.get("version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > known:
        raise CheckpointError(
            f"{path}: version={version} was written by a newer ds_moe_ep; this one reads versions "
            f"up to {known}. Update ds_moe_ep."
        )


def _why_no_manifest(folder: Path) -> str:
    quoted = shlex.quote(str(folder))
    if not folder.exists():
        return (
            f"{folder}: no such folder. Name an expert-sharded checkpoint, or write one: "
            f"ds-moe-ep convert SRC {quoted} --to ep."
        )
    if any((folder / name).is_file() for name in (MODEL_SAFETENSORS, INDEX_JSON)):
        return (
            f"{folder} has no {MANIFEST_JSON}: it is a Hugging Face directory, which does not say "
            "what its bytes must be. For an expert-sharded checkpoint of it: ds-moe-ep convert "
            f"{quoted} DST --to ep."
        )
    target = "DST" if any(folder.iterdir()) else quoted
    return (
        f"{folder} has no {MANIFEST_JSON}, so it is no whole expert-sharded checkpoint. Write "
        f"one: ds-moe-ep convert SRC {target} --to ep."
    )


_AGAIN = "Copy the checkpoint again from its source, or convert the model again."
