"""Which safetensors file of a model directory holds which tensor, and whether all are whole.

It reads headers, never values. Which tensors a rank needs is decided in mapping.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_moe_ep.checkpoint.header import StoredTensor, read_header
from ds_moe_ep.errors import CheckpointError

__all__ = ["CheckpointFiles", "open_checkpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
_SHOWN = 5


@dataclass(frozen=True)
class CheckpointFiles:
    """A checked checkpoint.

    Attributes:
        folder: The model directory.
        tensors: Where every tensor lies: in one piece, or in several that follow each other in
            dimension 0.
    """

    folder: Path
    tensors: Mapping[str, tuple[StoredTensor, ...]]


def open_checkpoint(folder: Path) -> CheckpointFiles:
    """Lists the tensors of a checkpoint after reading the header of each of its files.

    Args:
        folder: Hugging Face model directory with ``model.safetensors`` or an index and its shards.

    Raises:
        CheckpointError: No safetensors, files named in the index are missing, a file is truncated
            or not safetensors, or the index and the files disagree.
    """
    if (folder / _INDEX).is_file():
        listed = _read_index(folder / _INDEX)
    elif (folder / _SINGLE).is_file():
        listed = None
    else:
        raise CheckpointError(
            f"{folder} has neither {_SINGLE} nor {_INDEX}. {_pickled_hint(folder)}"
        )
    names = [_SINGLE] if listed is None else sorted(set(listed.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files that {_INDEX} names are missing: "
            f"{_some(missing)}."
        )
    found = {key: (tensor,) for name in names for key, tensor in _tensors(folder / name).items()}
    if listed is not None and (lost := sorted(listed.keys() - found.keys())):
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors of {_INDEX} are in none of its {len(names)} files: "
            f"{_some(lost)}."
        )
    return CheckpointFiles(folder, found)


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
    if outside := sorted({name for name in weight_map.values() if Path(name).name != name}):
        raise CheckpointError(f"{path}: names files outside of its folder: {_some(outside)}.")
    return weight_map


def _tensors(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="pt"):  # safetensors checks header and size
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
