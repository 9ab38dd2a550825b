"""Which safetensors file of a checkpoint holds which tensor, and whether all are whole.

It reads headers, never values, of Hugging Face directories and of expert-sharded checkpoints. Which
tensors a rank needs is decided in mapping.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape, read_header
from ds_moe_ep.checkpoint.manifest import (
    INDEX_JSON,
    MANIFEST_JSON,
    Manifest,
    TensorEntry,
    is_file_name,
    read_manifest,
)
from ds_moe_ep.errors import CheckpointError

__all__ = ["CheckpointFiles", "open_checkpoint", "open_expert_sharded"]

_SINGLE = "model.safetensors"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 5


@dataclass(frozen=True)
class CheckpointFiles:
    """A checked checkpoint.

    Attributes:
        folder: The directory.
        tensors: Where every tensor lies: in one piece, or in several that follow each other in
            dimension 0.
        manifest: That of an expert-sharded checkpoint; None for a Hugging Face directory.
    """

    folder: Path
    tensors: Mapping[str, tuple[StoredTensor, ...]]
    manifest: Manifest | None = None


def open_checkpoint(folder: Path) -> CheckpointFiles:
    """Lists the tensors of a checkpoint after reading the header of each of its files.

    Args:
        folder: Hugging Face model directory with ``model.safetensors`` or an index and its shards,
            or an expert-sharded checkpoint.

    Raises:
        CheckpointError: No safetensors, files named in the index or the manifest are missing, a
            file is truncated or not safetensors, or they disagree with what names them.
    """
    if (folder / INDEX_JSON).is_file():
        listed = _read_index(folder / INDEX_JSON)
    elif (folder / _SINGLE).is_file():
        listed = None
    elif (folder / MANIFEST_JSON).is_file():
        return open_expert_sharded(folder, read_manifest(folder))
    else:
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {INDEX_JSON}. {_pickled_hint(folder)}"
        )
    names = [_SINGLE] if listed is None else sorted(set(listed.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files that {INDEX_JSON} names are missing: "
            f"{_some(missing)}."
        )
    found = {key: (tensor,) for name in names for key, tensor in _tensors(folder / name).items()}
    if listed is not None and (lost := sorted(listed.keys() - found.keys())):
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors of {INDEX_JSON} are in none of its {len(names)} files: "
            f"{_some(lost)}."
        )
    return CheckpointFiles(folder, found)


def open_expert_sharded(folder: Path, manifest: Manifest) -> CheckpointFiles:
    """Lists the tensors of an expert-sharded checkpoint, as the headers of its files have them.

    Args:
        folder: The checkpoint.
        manifest: Its manifest.

    Raises:
        CheckpointError: A file is missing, of another size than in the manifest, or holds other
            tensors.
    """
    for name, file in manifest.files.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size != file.num_bytes:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise CheckpointError(
                f"{folder / name} {found}, {MANIFEST_JSON} says {file.num_bytes:,} bytes. Copy it "
                "again from its source."
            )
    names = {name for entry in manifest.tensors.values() for name in entry.files}
    held = {name: _tensors(folder / name) for name in sorted(names)}
    tensors = {}
    for key, entry in manifest.tensors.items():
        pieces = [held[name][key] for name in entry.files if key in held[name]]
        if not _is_made_of(entry, pieces):
            raise CheckpointError(
                f"{folder}: {MANIFEST_JSON} says that {key} is {entry.dtype} {entry.shape} in "
                f"{_some(entry.files)}; the files disagree. Convert the model again."
            )
        tensors[key] = tuple(pieces)
    return CheckpointFiles(folder, tensors, manifest)


def _is_made_of(entry: TensorEntry, pieces: list[StoredTensor]) -> bool:
    same_kind = {(piece.dtype, piece.shape[1:]) for piece in pieces}
    return (
        len(pieces) == len(entry.files)
        and same_kind == {(entry.dtype, tuple(entry.shape[1:]))}
        and list(joined_shape(pieces)) == entry.shape
    )


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not all(
            isinstance(name, str) for name in weight_map.values()
        ):
            raise TypeError("weight_map is not a table of file names")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors index ({error}). Copy it again from its source."
        ) from error
    if outside := sorted({name for name in weight_map.values() if not is_file_name(name)}):
        raise CheckpointError(f"{path}: names files outside of its folder: {_some(outside)}.")
    return weight_map


def _tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy"):  # safetensors checks header and size
            return read_header(path)[1]
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise CheckpointError(
            f"{path} ({size:,} bytes) is truncated or corrupt: {error}. Copy it again from its "
            "source."
        ) from error


def _pickled_hint(folder: Path) -> str:
    if any((folder / name).exists() for name in _PICKLED):
        return (
            "Pickled checkpoints (pytorch_model.bin) can run code and are not read: save the model "
            "again as safetensors."
        )
    return "Name a Hugging Face model directory with its weights."


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (
        f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    )
