"""Which safetensors file of a checkpoint holds which tensor, and whether all are whole.

It reads headers, never values, of Hugging Face directories and of expert-sharded checkpoints. Which
tensors a rank needs is decided in mapping.py.
"""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape, read_header
from ds_moe_ep.checkpoint.manifest import (
    INDEX_JSON,
    MANIFEST_JSON,
    MODEL_SAFETENSORS,
    Manifest,
    TensorEntry,
    is_file_name,
    read_manifest,
)
from ds_moe_ep.errors import CheckpointError, some

__all__ = [
    "MEGATRON_METADATA",
    "MEGATRON_TRACKER",
    "NAME_A_MODEL",
    "PICKLED_INDEX",
    "CheckpointFiles",
    "has_safetensors",
    "is_of_deepspeed",
    "is_of_megatron",
    "is_pickled",
    "open_checkpoint",
    "open_expert_sharded",
    "told_if_unreadable",
]

_PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"
MEGATRON_METADATA = ".metadata"
MEGATRON_TRACKER = "latest_checkpointed_iteration.txt"
"""Names the folder of the newest checkpoint, beside it."""

NAME_A_MODEL = (
    "Name a model directory; of a model on the hub, fetch it first: hf download ORG/MODEL "
    "--local-dir DIR"
)


@dataclass(frozen=True)
class CheckpointFiles:
    """A checked checkpoint.

    Attributes:
        folder: The directory.
        tensors: Where every tensor lies: in one piece, or in several that follow each other in
            dimension 0.
        manifest: That of an expert-sharded checkpoint; None for a Hugging Face directory.
        is_pickled: Whether torch.save wrote the files.
    """

    folder: Path
    tensors: Mapping[str, tuple[StoredTensor, ...]]
    manifest: Manifest | None = None
    is_pickled: bool = False


def open_checkpoint(folder: Path, *, allow_pickle: bool = False) -> CheckpointFiles:
    """Lists the tensors of a checkpoint after reading the header of each of its files.

    Args:
        folder: Hugging Face model directory with ``model.safetensors`` or an index and its shards,
            or an expert-sharded checkpoint.
        allow_pickle: Whether ``pytorch_model.bin`` or its shards will do where there are no
            safetensors. Even then no code in them is run.

    Raises:
        CheckpointError: No safetensors, files named in the index or the manifest are missing, a
            file is truncated or not safetensors, or they disagree with what names them.
    """
    with told_if_unreadable(folder):
        return _open(folder, allow_pickle)


@contextlib.contextmanager
def told_if_unreadable(folder: Path, done: str = "read") -> Iterator[None]:
    """Makes what the system refuses in the block an error of the checkpoint.

    Args:
        folder: The checkpoint, for the message.
        done: What cannot be done with it then, for the message too.

    Raises:
        CheckpointError: The system has refused: access is denied, say, or the name is too long.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be {done} ({error}).") from error


def _open(folder: Path, allow_pickle: bool) -> CheckpointFiles:
    if has_safetensors(folder):
        return CheckpointFiles(folder, _listed(folder, MODEL_SAFETENSORS, INDEX_JSON, _tensors))
    if (folder / MANIFEST_JSON).is_file():
        return open_expert_sharded(folder, read_manifest(folder))
    if allow_pickle and is_pickled(folder):
        from ds_moe_ep.checkpoint.pickled import read_pickled  # torch takes seconds

        tensors = _listed(folder, _PICKLED, PICKLED_INDEX, read_pickled)
        return CheckpointFiles(folder, tensors, is_pickled=True)
    raise CheckpointError(
        f"{folder} has neither {MODEL_SAFETENSORS} nor {INDEX_JSON}. {_other_formats(folder)}"
    )


def _listed(
    folder: Path, single: str, index: str, read: Callable[[Path], dict[str, StoredTensor]]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Lists the tensors of the single file, or of all that an index names.

    Where both are there, transformers reads the single one.
    """
    listed = None if (folder / single).is_file() else _read_index(folder / index)
    names = [single] if listed is None else sorted(set(listed.values()))
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} files that {index} names are missing: "
            f"{some(missing)}."
        )
    found: dict[str, tuple[StoredTensor, ...]] = {
        key: (tensor,) for name in names for key, tensor in read(folder / name).items()
    }
    if listed is not None and (lost := sorted(listed.keys() - found.keys())):
        raise CheckpointError(
            f"{folder}: {len(lost)} tensors of {index} are in none of its {len(names)} files: "
            f"{some(lost)}."
        )
    return found


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
                f"{some(entry.files)}; the files disagree. Convert the model again."
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
            f"{path}: not an index of weights ({error}). Copy it again from its source."
        ) from error
    if outside := sorted({name for name in weight_map.values() if not is_file_name(name)}):
        raise CheckpointError(f"{path}: names files outside of its folder: {some(outside)}.")
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


def has_safetensors(folder: Path) -> bool:
    """Returns whether a folder has the weights of a Hugging Face directory as safetensors."""
    return _has_any(folder, MODEL_SAFETENSORS, INDEX_JSON)


def is_pickled(folder: Path) -> bool:
    """Returns whether the only weights that a folder has are pickled ones."""
    return not has_safetensors(folder) and _has_any(folder, _PICKLED, PICKLED_INDEX)


def is_of_deepspeed(folder: Path) -> bool:
    """Returns whether DeepSpeed's loader reads a folder."""
    with told_if_unreadable(folder):
        return any(folder.glob("*/mp_rank_00_model_states.pt"))


def is_of_megatron(folder: Path) -> bool:
    """Returns whether a folder is a checkpoint of Megatron, or holds checkpoints of it."""
    return _has_any(folder, MEGATRON_METADATA, MEGATRON_TRACKER)


def _has_any(folder: Path, *names: str) -> bool:
    with told_if_unreadable(folder):
        return any((folder / name).is_file() for name in names)


def _other_formats(folder: Path) -> str:
    quoted = shlex.quote(str(folder))
    if not folder.exists():
        return NAME_A_MODEL
    if is_pickled(folder):
        return (
            f"Pickled checkpoints ({_PICKLED}) can run code and are not read. To make safetensors "
            f"of this one, without running any: ds-moe-ep convert {quoted} DST --to hf "
            "--allow-pickle."
        )
    if is_of_deepspeed(folder):
        return (
            "It is a checkpoint of DeepSpeed, which DeepSpeed's own loader reads; convert what it "
            "was made from."
        )
    if is_of_megatron(folder):
        return (
            "It is a checkpoint of Megatron. To make a Hugging Face directory of it: ds-moe-ep "
            f"convert {quoted} DST --to hf."
        )
    return "Name a Hugging Face model directory with its weights."
