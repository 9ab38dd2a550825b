"""Reads tensors from their byte ranges: the bytes of the rows that are asked for, and no others.

safetensors' own reader maps files into memory, where every page that was looked at stays counted as
this process's, or reads a tensor whole; what is read here is what one rank keeps. Which rows these
are is decided in mapping.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.checkpoint.streams import read_exactly
from ds_moe_ep.errors import CheckpointError

__all__ = ["DTYPES", "StoredSlice", "TensorReader"]

# Source: https://github.com/huggingface/safetensors#format
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


class TensorReader:
    """Holds files open between reads; as a context manager it closes them at the end."""

    def __init__(self) -> None:
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, pieces: Sequence[StoredTensor]) -> torch.Tensor:
        """Reads a tensor from its pieces, which follow each other in dimension 0.

        Raises:
            CheckpointError: A file has become shorter or cannot be read, or the dtype is unknown.
        """
        dtype = DTYPES.get(pieces[0].dtype)
        if dtype is None:
            raise CheckpointError(
                f"{pieces[0].path}: tensors of type {pieces[0].dtype} cannot be read. Known are "
                f"{', '.join(DTYPES)}: save the model in one of these."
            )
        data = torch.empty(sum(piece.num_bytes for piece in pieces), dtype=torch.uint8)
        view = memoryview(data.numpy())
        for piece in pieces:
            self._fill(view[: piece.num_bytes], piece)
            view = view[piece.num_bytes :]
        return data.view(dtype).reshape(joined_shape(pieces))

    def _fill(self, view: memoryview, piece: StoredTensor) -> None:
        try:
            read_exactly(self._open(piece.path), piece.start, view)
        except OSError as error:
            raise CheckpointError(f"{piece.path} cannot be read: {error}.") from error

    def _open(self, path: Path) -> IO[bytes]:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = path.open("rb", buffering=0)
        return file


class StoredSlice:
    """Rows on disk that are read when indexed with ``...``.

    It stands in for safetensors' slice object in transformers' loader.

    Args:
        reader: What reads them.
        pieces: Where they lie, in their order in dimension 0.
    """

    def __init__(self, reader: TensorReader, pieces: Sequence[StoredTensor]) -> None:
        self._reader, self._pieces = reader, pieces

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Reads the bytes."""
        return self._reader.read(self._pieces)[index]
