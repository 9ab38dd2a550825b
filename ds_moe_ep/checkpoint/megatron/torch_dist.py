"""The files of a torch_dist checkpoint: torch's distributed checkpoint as Megatron names its files.

A file holds tensors one after the other, each as `torch.save` writes it; ``.metadata`` says which
part of which tensor lies where. Which tensors these are is decided in names.py.

Source: torch/distributed/checkpoint/filesystem.py of torch 2.13.
"""

from __future__ import annotations

import enum
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ds_moe_ep.checkpoint.files import MEGATRON_METADATA
from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.checkpoint.layout import PlannedFile
from ds_moe_ep.checkpoint.mapping import rows_of
from ds_moe_ep.checkpoint.reader import DTYPES, TensorReader
from ds_moe_ep.checkpoint.torch_save import saved, saved_bytes, torch_save
from ds_moe_ep.errors import CheckpointError

__all__ = ["MAX_CHUNK_BYTES", "METADATA_JSON", "Chunk", "chunks_of", "torch_dist_files"]

METADATA_JSON = "metadata.json"
_COMMON = "common.pt"

MAX_CHUNK_BYTES = 128 << 20
"""How large a part of a tensor may be; each thread that writes holds one in memory."""

# 3.0: q, k and v lie as they do since Megatron-LM 2.1, so that none are moved when it is loaded.
_COMMON_STATE = {"checkpoint_version": 3.0, "iteration": 0}
_BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}


@dataclass(frozen=True)
class Chunk:
    """A part of a tensor, in one piece in a file.

    Attributes:
        key: Name of the tensor.
        shape: Shape of the whole tensor.
        offsets: Where the part begins in it.
        sizes: Shape of the part.
        pieces: Where its bytes come from, in order.
    """

    key: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    pieces: tuple[StoredTensor, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Its type."""
        return DTYPES[self.pieces[0].dtype]

    @property
    def saved_bytes(self) -> int:
        """Its size in a file."""
        return saved_bytes(self.dtype, self.sizes)


def chunks_of(
    key: str,
    index: tuple[int, ...],
    leading: tuple[int, ...],
    pieces: Sequence[StoredTensor],
    max_bytes: int = MAX_CHUNK_BYTES,
) -> Iterator[Chunk]:
    """Yields the parts in which a tensor is written, as large as may be but at least a row.

    Args:
        key: Its name.
        index: Its place in the leading dimensions.
        leading: Their sizes.
        pieces: What it is made of; they follow each other in its dimension 0.
        max_bytes: Size of a part that is held in memory.

    Raises:
        CheckpointError: The pieces do not fit each other, or torch has no such type.
    """
    kinds = {(piece.dtype, piece.shape[1:]) for piece in pieces}
    if len(kinds) > 1 or pieces[0].dtype not in DTYPES:
        found = " and ".join(f"{dtype} {[*shape]}" for dtype, shape in sorted(kinds))
        raise CheckpointError(
            f"{key} cannot be made of rows of types and shapes {found} ({pieces[0].path}). Save "
            f"the model with one type for each matrix, of {', '.join(DTYPES)}."
        )
    shape = joined_shape(pieces)
    ones = (1,) * len(leading)
    num_bytes = sum(piece.num_bytes for piece in pieces)
    row_bytes = max(1, num_bytes // shape[0])
    step = max(1, max_bytes // row_bytes)
    for start in range(0, shape[0], step):
        rows = range(start, min(start + step, shape[0]))
        yield Chunk(
            key,
            (*leading, *shape),
            (*index, start, *(0 for _ in shape[1:])),
            (*ones, len(rows), *shape[1:]),
            tuple(rows_of(pieces, rows)),
        )


def torch_dist_files(
    files: Sequence[Sequence[Chunk]], objects: Sequence[str]
) -> tuple[list[PlannedFile], list[PlannedFile]]:
    """Plans the files of a checkpoint.

    Args:
        files: What goes into each file with tensors.
        objects: Names of objects that hold nothing.

    Returns:
        The large files, and the small ones, which are to be written after them.
    """
    nothing = saved([None])  # one place for all objects: nothing in it depends on the name
    weights = [PlannedFile(_name(0), nothing)]
    places = {MetadataIndex(key): _StorageInfo(_name(0), 0, len(nothing)) for key in objects}
    tensors: dict[str, TensorStorageMetadata] = {}
    for number, chunks in enumerate(files, start=1):
        offset = 0
        for chunk in chunks:
            known = _entry(tensors, chunk)
            part = ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
            place = MetadataIndex(chunk.key, chunk.offsets, len(known.chunks))
            places[place] = _StorageInfo(_name(number), offset, chunk.saved_bytes)
            known.chunks.append(part)
            offset += chunk.saved_bytes
        ranges = tuple(piece for chunk in chunks for piece in chunk.pieces)
        weights.append(PlannedFile(_name(number), b"", ranges, partial(_write, chunks)))
    content = Metadata(
        state_dict_metadata={**tensors, **{key: BytesStorageMetadata() for key in objects}},
        planner_data={key: (key,) for key in (*tensors, *objects)},
        storage_data=places,
    )
    return weights, [
        PlannedFile(MEGATRON_METADATA, _pickled(content)),
        PlannedFile(_COMMON, saved(_COMMON_STATE)),
        PlannedFile(METADATA_JSON, json.dumps(_BACKEND).encode()),
    ]


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        # Some Pythons, such as 3.11.2, would have readers call getattr, which those that let in
        # listed names only refuse.
        if isinstance(value, enum.Enum):
            return type(value), (value.value,)
        return NotImplemented


def _pickled(content: Metadata) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(content)
    return buffer.getvalue()


def _name(number: int) -> str:
    return f"__0_{number}.distcp"


def _entry(tensors: dict[str, TensorStorageMetadata], chunk: Chunk) -> TensorStorageMetadata:
    """Returns the entry of a chunk's tensor, a new one if it is the first."""
    shape, dtype = torch.Size(chunk.shape), chunk.dtype
    new = TensorStorageMetadata(TensorProperties(dtype=dtype), shape, [])
    entry = tensors.setdefault(chunk.key, new)
    if (entry.size, entry.properties.dtype) != (shape, dtype):
        raise CheckpointError(
            f"{chunk.key} is one tensor for all layers, but some are {entry.properties.dtype} "
            f"{[*entry.size]} and others {dtype} {[*shape]} ({chunk.pieces[0].path}). Save the "
            "model with one type."
        )
    return entry


def _write(chunks: Sequence[Chunk], out: IO[bytes]) -> None:
    with TensorReader() as reader:
        for chunk in chunks:
            torch_save(reader.read(chunk.pieces).reshape(chunk.sizes), out)
