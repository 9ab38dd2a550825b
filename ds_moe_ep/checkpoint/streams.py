"""Bytes on their way: read, hashed and counted, several files at a time.

Which bytes these are is decided elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import IO, TypeVar

from ds_moe_ep.errors import CheckpointError

__all__ = [
    "CHUNK_BYTES",
    "HashingSink",
    "Progress",
    "hash_file",
    "hash_files",
    "in_threads",
    "read_exactly",
]

CHUNK_BYTES = 8 << 20
"""How much is read at a time."""

Progress = Callable[[float], None]
"""Is told of bytes that are done."""

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")

_MAX_THREADS = 8


class _StoppedError(Exception):
    """Another thread has failed, so this one need not go on."""


class HashingSink:
    """What a file is written to: it hashes what passes and tells of it.

    Args:
        out: The file.
        progress: Is told of the bytes.
        stop: Set when another thread has failed.
    """

    def __init__(self, out: IO[bytes], progress: Progress, stop: threading.Event) -> None:
        self._out, self._progress, self._stop = out, progress, stop
        self._digest = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The hash of what was written, in hexadecimal."""
        return self._digest.hexdigest()

    def write(self, chunk: bytes | memoryview) -> int:
        """Writes some bytes and returns how many; stops where another thread has failed."""
        _check(self._stop)
        self._out.write(chunk)
        self._digest.update(chunk)
        self._progress(len(chunk))
        return len(chunk)

    def flush(self) -> None:
        """Writes what is still in memory."""
        self._out.flush()


def read_exactly(file: IO[bytes], start: int, view: memoryview) -> None:
    """Fills memory with the bytes of a file from a place on; where the file stands does not count.

    Raises:
        CheckpointError: The file is not that long.
        OSError: It cannot be read.
    """
    while view:
        num_bytes = os.preadv(file.fileno(), [view], start)
        if num_bytes == 0:
            raise CheckpointError(f"{file.name} became shorter while it was read.")
        view, start = view[num_bytes:], start + num_bytes


def hash_files(
    paths: Sequence[Path], progress: Progress = lambda num_bytes: None
) -> Iterator[tuple[Path, str]]:
    """Yields each file with its sha256, several at a time.

    Raises:
        OSError: A file cannot be read.
    """
    stop = threading.Event()
    yield from in_threads(paths, lambda path: hash_file(path, progress, stop), stop)


def hash_file(path: Path, progress: Progress, stop: threading.Event) -> str:
    """Returns the sha256 of a file in hexadecimal.

    Args:
        path: The file.
        progress: Is told of the bytes.
        stop: Set when another thread has failed.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            _check(stop)
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def in_threads(
    items: Sequence[_Item], work: Callable[[_Item], _Made], stop: threading.Event
) -> Iterator[tuple[_Item, _Made]]:
    """Yields items with what `work` makes of them, as they are done; the first error ends all.

    Args:
        items: What to work on.
        work: Makes something of an item.
        stop: Is set at the first error.
    """
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        futures = {pool.submit(work, item): item for item in items}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise _StoppedError
