"""Tensors that are made from others while they are written: copied, cut, scaled, with noise; drawn.

They are made a few megabytes at a time, and from the same source and seed always the same bytes.
Which tensors an upcycled model needs is decided in upcycled_tensors.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import torch

from ds_moe_ep.checkpoint.header import ByteRange, StoredTensor
from ds_moe_ep.checkpoint.layout import ProducedBytes
from ds_moe_ep.checkpoint.reader import DTYPES
from ds_moe_ep.checkpoint.streams import read_exactly
from ds_moe_ep.errors import CheckpointError

__all__ = ["DerivedTensor", "DrawnValues", "Noise", "changed", "torch_dtype"]

_CHUNK_BYTES = 2 << 20  # several times that is in use while a chunk is computed, by each thread
_DTYPES = {name: DTYPES[name] for name in ("F64", "F32", "F16", "BF16")}


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is yet to be made; a piece of a file as a stored one is.

    Attributes:
        dtype: safetensors' name of its type.
        shape: Its shape.
        parts: What its bytes are, in row-major order; each row of dimension 0 has as many.
    """

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[ByteRange | ProducedBytes, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def element_bytes(self) -> int:
        """Bytes of one element."""
        return self.num_bytes // (math.prod(self.shape) or 1)

    @property
    def path(self) -> Path:
        """The file that its first bytes come from; nowhere if they are drawn."""
        source = self._source
        return source.path if source else Path()

    @property
    def start(self) -> int:
        """Where they begin in it."""
        source = self._source
        return source.start if source else 0

    @property
    def _source(self) -> ByteRange | None:
        first = next(iter(self.parts), None)
        return first.source if isinstance(first, ProducedBytes) else first

    def cut(self, rows: range) -> DerivedTensor:
        """Returns some rows of dimension 0."""
        num_parts = len(self.parts) // self.shape[0]
        parts = self.parts[rows.start * num_parts : rows.stop * num_parts]
        return replace(self, shape=(len(rows), *self.shape[1:]), parts=parts)


@dataclass(frozen=True)
class Noise:
    """Gaussian noise on a tensor.

    Attributes:
        relative_std: Its standard deviation, as a multiple of that of the scaled tensor.
        seed: Seed of the run.
        stream: What else decides the values: which tensor, of which expert.
    """

    relative_std: float
    seed: int
    stream: str


def changed(
    tensor: StoredTensor,
    *,
    rows: range | None = None,
    columns: range | None = None,
    scale: float = 1.0,
    noise: Noise | None = None,
) -> ByteRange | ProducedBytes:
    """Returns the bytes of a part of a tensor, changed.

    Args:
        tensor: A vector or a matrix.
        rows: What to take of dimension 0; by default all of it.
        columns: What to take of dimension 1.
        scale: What to multiply it with.
        noise: What to add then.

    Returns:
        A range of the source file where that is all there is to it.

    Raises:
        CheckpointError: There is more to it, and its type is not one to calculate with.
    """
    taken = tensor if rows is None else tensor.cut(rows)
    if columns is not None and len(columns) == tensor.shape[1]:
        columns = None
    if columns is None and scale == 1.0 and noise is None:
        return ByteRange(taken.path, taken.start, taken.num_bytes, state=taken.state)
    torch_dtype(tensor)
    return _Changed(tensor, taken, columns, scale, noise)


def torch_dtype(tensor: StoredTensor) -> torch.dtype:
    """Returns the type of a tensor that is to be calculated with.

    Raises:
        CheckpointError: It is not a floating-point type of 16 bits or more.
    """
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        raise CheckpointError(
            f"{tensor.path}: a weight of type {tensor.dtype} cannot be upcycled. Save the model in "
            f"one of {', '.join(_DTYPES)} first."
        )
    return dtype


@dataclass(frozen=True)
class _Changed(ProducedBytes):
    """Part of a tensor, scaled, with noise. `whole` is what the noise is measured by."""

    whole: StoredTensor
    taken: StoredTensor
    columns: range | None
    scale: float
    noise: Noise | None

    @property
    def source(self) -> ByteRange:
        return self.whole

    @property
    def num_bytes(self) -> int:
        return self._num_rows * self._row_bytes

    @property
    def _num_rows(self) -> int:
        return self.taken.shape[0]

    @property
    def _row_bytes(self) -> int:
        if self.columns is not None:
            return len(self.columns) * self.taken.element_bytes
        return self.taken.num_bytes // (self._num_rows or 1)

    def recipe(self) -> str:
        place = (self.taken.start, self.taken.shape, self.columns)
        return repr((place, self.scale, self.noise))

    def chunks(self) -> Iterator[bytes]:
        dtype = torch_dtype(self.whole)
        std, generator = 0.0, torch.Generator()
        if self.noise is not None:
            std = self.noise.relative_std * _std(self.whole) * self.scale
            generator.manual_seed(_seed(self.noise.seed, self.noise.stream))
        with self.taken.path.open("rb", buffering=0) as file:
            for rows in _in_chunks(self._num_rows, self._row_bytes):
                values = torch.frombuffer(self._read(file, rows), dtype=dtype).double()
                values *= self.scale
                if std:
                    values += std * torch.randn(len(values), generator=generator)
                yield _to_bytes(values.to(dtype))

    def _read(self, file: IO[bytes], rows: range) -> bytearray:
        """Reads some rows: in one go, or where columns are left out, one by one."""
        taken = self.taken.cut(rows)
        if self.columns is None:
            return _bytes_of(file, taken.start, taken.num_bytes)
        stride = taken.num_bytes // (len(rows) or 1)
        start = taken.start + self.columns.start * taken.element_bytes
        found = bytearray()
        for row in range(len(rows)):
            found += _bytes_of(file, start + row * stride, self._row_bytes)
        return found


@dataclass(frozen=True)
class DrawnValues(ProducedBytes):
    """Values of a normal distribution around 0.

    Attributes:
        dtype: Their type.
        count: How many.
        std: Standard deviation; 0 for zeros.
        seed: Seed of the run.
        stream: What else decides the values: which tensor it is.
    """

    dtype: torch.dtype
    count: int
    std: float = 0.0
    seed: int = 0
    stream: str = ""

    @property
    def source(self) -> None:
        """No file."""
        return None

    @property
    def num_bytes(self) -> int:
        """How many there are."""
        return self.count * self.dtype.itemsize

    def recipe(self) -> str:
        """Returns what decides the values."""
        return repr(self)

    def chunks(self) -> Iterator[bytes]:
        """Yields them."""
        generator = torch.Generator().manual_seed(_seed(self.seed, self.stream))
        for chunk in _in_chunks(self.count, self.dtype.itemsize):
            if self.std:
                values = self.std * torch.randn(len(chunk), generator=generator)
            else:
                values = torch.zeros(len(chunk))
            yield _to_bytes(values.to(self.dtype))


def _in_chunks(count: int, item_bytes: int) -> Iterator[range]:
    step = max(1, _CHUNK_BYTES // max(1, item_bytes))
    for begin in range(0, count, step):
        yield range(begin, min(begin + step, count))


def _to_bytes(values: torch.Tensor) -> bytes:
    return values.view(torch.uint8).numpy().tobytes() if values.numel() else b""


def _seed(seed: int, stream: str) -> int:
    """Returns the seed of one stream of random numbers among many of a run."""
    digest = hashlib.sha256(f"{seed}:{stream}".encode()).digest()
    return int.from_bytes(digest[:7], "little")


def _bytes_of(file: IO[bytes], start: int, num_bytes: int) -> bytearray:
    found = bytearray(num_bytes)
    read_exactly(file, start, memoryview(found))
    return found


@functools.lru_cache(maxsize=4096)  # every expert asks for it again
def _std(tensor: StoredTensor) -> float:
    """Returns the standard deviation of a tensor's values, read in chunks."""
    dtype, count = torch_dtype(tensor), math.prod(tensor.shape)
    total = total_of_squares = 0.0
    with tensor.path.open("rb", buffering=0) as file:
        for items in _in_chunks(count, tensor.element_bytes):
            start = tensor.start + items.start * tensor.element_bytes
            data = _bytes_of(file, start, len(items) * tensor.element_bytes)
            values = torch.frombuffer(data, dtype=dtype).double()
            total += float(values.sum())
            total_of_squares += float(values.square().sum())
    mean = total / count
    return math.sqrt(max(0.0, total_of_squares / count - mean * mean))
