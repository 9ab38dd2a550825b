"""The header of a safetensors file: which tensor lies where in it, read and written.

The format is 8 bytes of header length (little-endian), the header as JSON, then the tensors' bytes.
Values are never read here, and whether a file is whole is checked in files.py.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

__all__ = [
    "ByteRange",
    "FileState",
    "Piece",
    "StoredTensor",
    "joined_shape",
    "make_header",
    "read_header",
]

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class FileState:
    """What changes when a file does.

    Attributes:
        path: The file, without links.
        num_bytes: Its size.
        mtime_ns: When it was written, as the system says.
    """

    path: Path
    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Returns that of a file as it is now; OSError if there is none."""
        state = path.stat()
        return cls(path.resolve(), state.st_size, state.st_mtime_ns)


@dataclass(frozen=True)
class ByteRange:
    """Some bytes of a file.

    Attributes:
        path: The file.
        start: Where they begin in it.
        num_bytes: How many there are.
        state: What the file was like when it was looked at; None where nobody kept that.
    """

    path: Path
    start: int
    num_bytes: int
    state: FileState | None = field(default=None, kw_only=True, compare=False, repr=False)


class Piece(Protocol):
    """A tensor to write, or some rows of its dimension 0: in a file, or yet to be made."""

    @property
    def path(self) -> Path:
        """The file that its bytes come from."""

    @property
    def start(self) -> int:
        """Where they begin in it."""

    @property
    def num_bytes(self) -> int:
        """How many there are."""

    @property
    def dtype(self) -> str:
        """Its type, as safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; 0 for types of less than a byte."""

    @property
    def parts(self) -> tuple[Any, ...]:
        """What its bytes are, in order: `ByteRange`, or `ProducedBytes` of layout.py."""

    def cut(self, rows: range) -> Piece:
        """Returns some rows of dimension 0."""


@dataclass(frozen=True)
class StoredTensor(ByteRange):
    """A tensor in a file, or some rows of its dimension 0.

    Attributes:
        dtype: safetensors' name of its type, such as ``BF16``.
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def element_bytes(self) -> int:
        """Bytes of one element; 0 for types of less than a byte."""
        return self.num_bytes // (math.prod(self.shape) or 1)

    @property
    def parts(self) -> tuple[ByteRange, ...]:
        """Its bytes are one range of its file."""
        return (self,)

    def cut(self, rows: range) -> StoredTensor:
        """Returns some rows of dimension 0; in row-major order their bytes lie together."""
        row_bytes = self.num_bytes // self.shape[0]
        return replace(
            self,
            shape=(len(rows), *self.shape[1:]),
            start=self.start + rows.start * row_bytes,
            num_bytes=len(rows) * row_bytes,
        )


def joined_shape(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """Returns the shape of a tensor from its pieces, which follow each other in dimension 0."""
    if len(pieces) == 1:
        return pieces[0].shape
    return (sum(piece.shape[0] for piece in pieces), *pieces[0].shape[1:])


def read_header(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """Reads the metadata and the tensors, in the order of their bytes, of a checked file."""
    state = FileState.of(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    begin = _LENGTH_BYTES + length
    tensors = {}
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        tensors[key] = StoredTensor(
            path, begin + start, end - start, entry["dtype"], shape, state=state
        )
    return metadata, tensors


def make_header(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, Sequence[Piece]]]
) -> bytes:
    """Makes the header, with its length in front, of a file whose tensors follow in this order.

    Args:
        metadata: What is to stand in ``__metadata__``.
        tensors: Names with the pieces that make up the tensor.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, pieces in tensors:
        start, end = end, end + sum(piece.num_bytes for piece in pieces)
        header[key] = {
            "dtype": pieces[0].dtype,
            "shape": joined_shape(pieces),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)  # the bytes after it stay aligned
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text
