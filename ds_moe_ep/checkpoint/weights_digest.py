"""Tells the weights of two models apart without reading them whole.

It knows no model: it takes the tensors that files.py has found.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import ByteRange, StoredTensor, joined_shape
from ds_moe_ep.checkpoint.streams import in_threads
from ds_moe_ep.errors import CheckpointError

__all__ = ["weights_digest"]

_SAMPLE_BYTES = 256
_STRETCH_BYTES = 64 << 20
# On a slow disk each read takes milliseconds, and the experts of a large model are 40,000 tensors.
_MOST_ALIKE = 256
_NUMBER = re.compile(r"\d+")


def weights_digest(files: CheckpointFiles) -> str:
    """Hashes the name, type and shape of every tensor, and some of its bytes.

    Of each tensor 256 bytes are read, or as many for each 64 MiB of it; of more than 256 tensors
    whose names differ in numbers alone, as those of experts, 256. Weights that differ nowhere but
    between these pass for the same. How tensors are spread over files does not count, nor where
    and when the files were written: copies of a model have one hash, and so has what it was
    converted to for expert parallelism.

    Args:
        files: The checkpoint.

    Returns:
        The sha256, in hexadecimal.

    Raises:
        CheckpointError: A file cannot be read, or became shorter.
    """
    tensors = dict(sorted(files.tensors.items()))
    samples = {key: [*_samples(tensors[key])] for key in _some_of_each_kind(tensors)}
    of_file: dict[Path, list[ByteRange]] = defaultdict(list)
    for ranges in samples.values():
        for each in ranges:
            of_file[each.path].append(each)
    content: dict[ByteRange, bytes] = {}
    try:
        for ranges, found in in_threads([*of_file.values()], _read, threading.Event()):
            content.update(zip(ranges, found, strict=True))
    except OSError as error:
        raise CheckpointError(f"{files.folder} cannot be read: {error}.") from error
    digest = hashlib.sha256()
    for key, pieces in tensors.items():
        digest.update(repr((key, pieces[0].dtype, [*joined_shape(pieces)])).encode())
        for each in samples.get(key, ()):
            digest.update(content[each])
    return digest.hexdigest()


def _some_of_each_kind(keys: Iterable[str]) -> list[str]:
    """Picks names, at equal distances, of those that differ in numbers alone."""
    alike: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        alike[_NUMBER.sub("*", key)].append(key)
    return [
        names[place * len(names) // count]
        for names in alike.values()
        for count in [min(len(names), _MOST_ALIKE)]
        for place in range(count)
    ]


def _samples(pieces: Sequence[StoredTensor]) -> Iterator[ByteRange]:
    """Yields what is read of a tensor: the middle of each of its equal stretches, in order."""
    num_bytes = sum(piece.num_bytes for piece in pieces)
    count = 1 + num_bytes // _STRETCH_BYTES
    for number in range(count):
        start = max(0, (2 * number + 1) * num_bytes // (2 * count) - _SAMPLE_BYTES // 2)
        stop = min(start + _SAMPLE_BYTES, num_bytes)
        for piece in pieces:
            first, end = max(start, 0), min(stop, piece.num_bytes)
            if first < end:
                yield ByteRange(piece.path, piece.start + first, end - first)
            start, stop = start - piece.num_bytes, stop - piece.num_bytes


def _read(ranges: Sequence[ByteRange]) -> list[bytes]:
    """Reads parts of one file."""
    path = ranges[0].path
    with path.open("rb", buffering=0) as file:
        found = [os.pread(file.fileno(), each.num_bytes, each.start) for each in ranges]
    if any(len(content) < each.num_bytes for content, each in zip(found, ranges, strict=True)):
        raise CheckpointError(f"{path} became shorter while it was read.")
    return found
