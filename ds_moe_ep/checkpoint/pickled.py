"""Finds the tensors in a pickled file of torch without running its code, and without reading them.

torch's restricted unpickler makes tensors and plain containers only, here without memory behind
them; each then tells where its bytes lie in the file.

Source: https://docs.pytorch.org/docs/2.13/notes/serialization.html
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_moe_ep.checkpoint.header import FileState, StoredTensor
from ds_moe_ep.checkpoint.reader import DTYPES
from ds_moe_ep.errors import CheckpointError

__all__ = ["read_pickled", "read_pickled_tensor"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_INSTEAD = "Save the model again as safetensors where it was made."


def read_pickled(path: Path) -> dict[str, StoredTensor]:
    """Lists the tensors of a file that ``torch.save`` wrote of a model's state dict.

    Args:
        path: The file.

    Raises:
        CheckpointError: It holds anything but tensors, is truncated or corrupt, in the format of
            torch before 1.6, or its tensors do not lie in the file as they are.
    """
    with _refusing(path), _opened(path) as (file, state):
        content = _load(path, file)
        if not isinstance(content, dict):
            raise CheckpointError(
                f"{path} holds a {type(content).__name__}, no tensors by name. {_INSTEAD}"
            )
        size = state.num_bytes
        return {key: _stored(path, key, value, size, state) for key, value in content.items()}


def read_pickled_tensor(path: Path, start: int, num_bytes: int) -> StoredTensor:
    """Finds a tensor in a part of a file that is what ``torch.save`` wrote of it alone.

    Args:
        path: The file.
        start: Where the part begins in it, in bytes.
        num_bytes: Its size.

    Raises:
        CheckpointError: See `read_pickled`.
    """
    with _refusing(path), _opened(path) as (file, state):
        content = _load(path, cast(IO[bytes], _Part(file, start, num_bytes)))
        found = _stored(path, f"the tensor at byte {start:,}", content, num_bytes, state)
        return replace(found, start=start + found.start)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], FileState]]:
    """Opens a file that was looked at first: what changes it from now on can be noticed."""
    state = FileState.of(path)
    with path.open("rb") as file:
        yield file, state


class _Part(io.RawIOBase):
    """A part of a file as if it were one."""

    def __init__(self, file: IO[bytes], start: int, num_bytes: int) -> None:
        self._file, self._start, self._num_bytes = file, start, num_bytes
        self.seek(0)

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._num_bytes}
        return self._file.seek(self._start + max(0, begin[whence] + offset)) - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)[: max(0, self._num_bytes - self.tell())]
        data = self._file.read(len(view))
        view[: len(data)] = data
        return len(data)


def _load(path: Path, file: IO[bytes]) -> Any:
    """Reads what a file has, or a part of the file at `path`, without the tensors' values."""
    _check_archive(path, file)
    file.seek(0)
    with FakeTensorMode():
        return torch.load(file, map_location="cpu", weights_only=True)


@contextlib.contextmanager
def _refusing(path: Path) -> Iterator[None]:
    """Makes a refusal of whatever is raised."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # what nobody vouches for can break its readers anyhow
        raise _refusal(path, error) from error


def _check_archive(path: Path, file: IO[bytes]) -> None:
    """Refuses torch's older format, and tensors whose bytes are not as they would be in memory."""
    if not zipfile.is_zipfile(file):
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) is truncated, or in the format of torch "
            f"before 1.6. Copy it again from its source. {_INSTEAD}"
        )
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        # Before any is read, as a compressed one may be far larger than its file.
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"{path} is compressed, which torch.save never does. {_INSTEAD}")
        orders = [archive.read(e) for e in entries if e.filename.endswith("/byteorder")]
    if any(order != b"little" for order in orders):
        raise CheckpointError(f"{path} was written on a big-endian machine. {_INSTEAD}")


def _refusal(path: Path, error: Exception) -> CheckpointError:
    if found := re.search(r"(?:Unsupported|unsupported)[^.]*?(?:GLOBAL|class) (\S+)", str(error)):
        return CheckpointError(
            f"{path} holds more than tensors: it asks for {found[1]}, which can run code. None was "
            f"run, and nothing of the file was used. {_INSTEAD}"
        )
    # Not torch's own words, which advise to read the file nevertheless.
    return CheckpointError(
        f"{path} is corrupt, or holds more than tensors ({type(error).__name__}). Copy it again "
        f"from its source. {_INSTEAD}"
    )


def _stored(
    path: Path, key: object, value: object, file_bytes: int, state: FileState
) -> StoredTensor:
    if not isinstance(key, str) or not isinstance(value, torch.Tensor):
        raise CheckpointError(
            f"{path}: the entry {key!r} is no tensor with a name, and a model's file holds nothing "
            f"else. {_INSTEAD}"
        )
    if value.layout != torch.strided or not value.is_contiguous() or value.dtype not in _NAMES:
        raise CheckpointError(
            f"{path}: {key} does not lie in the file as it is (strides {tuple(value.stride())} of "
            f"{value.dtype} {list(value.shape)}). {_INSTEAD}"
        )
    storage = value.untyped_storage()
    skipped_bytes = value.storage_offset() * value.element_size()
    start = storage._checkpoint_offset + skipped_bytes
    if skipped_bytes + value.nbytes > storage.nbytes() or start + value.nbytes > file_bytes:
        raise CheckpointError(f"{path}: {key} reaches beyond its data. {_INSTEAD}")
    name, shape = _NAMES[value.dtype], tuple(value.shape)
    return StoredTensor(path, start, value.nbytes, name, shape, state=state)
