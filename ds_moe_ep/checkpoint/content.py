"""What planned files are made of: the files behind them, what tells them apart, and their bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from ds_moe_ep.checkpoint.header import ByteRange, FileState
from ds_moe_ep.checkpoint.layout import PlannedFile, ProducedBytes
from ds_moe_ep.checkpoint.streams import CHUNK_BYTES
from ds_moe_ep.errors import CheckpointError

__all__ = ["copy_content", "fingerprint", "source_states"]


def source_states(files: Sequence[PlannedFile]) -> dict[Path, FileState]:
    """Returns what each source file was like when it was first looked at."""
    states: dict[Path, FileState] = {}
    for file in files:
        for part in file.ranges:
            source = _source_of(part)
            if source is not None and source.path not in states:
                states[source.path] = source.state or FileState.of(source.path)
    return states


def fingerprint(files: Sequence[PlannedFile], states: Mapping[Path, FileState]) -> str:
    """Returns what changes when a source file or any byte that is to be copied does."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(repr((file.name, file.head)).encode())
        for part in file.ranges:
            if isinstance(part, ProducedBytes):
                digest.update(part.recipe().encode())
            if (source := _source_of(part)) is not None:
                state = states[source.path]
                digest.update(repr((state, source.start, source.num_bytes)).encode())
    return digest.hexdigest()


def copy_content(file: PlannedFile, out: IO[bytes]) -> None:
    """Writes a file's bytes, those of its sources as they are now.

    Raises:
        CheckpointError: A source became shorter.
    """
    out.write(file.head)
    with contextlib.ExitStack() as stack:
        opened: tuple[Path, IO[bytes]] | None = None
        for part in file.ranges:
            if isinstance(part, ProducedBytes):
                for chunk in part.chunks():
                    out.write(chunk)
                continue
            if opened is None or opened[0] != part.path:
                stack.close()
                opened = part.path, stack.enter_context(part.path.open("rb", buffering=0))
            source = opened[1]
            source.seek(part.start)
            left = part.num_bytes
            while left:
                chunk = source.read(min(left, CHUNK_BYTES))
                if not chunk:
                    raise CheckpointError(f"{part.path} became shorter while it was read.")
                left -= len(chunk)
                out.write(chunk)


def _source_of(part: ByteRange | ProducedBytes) -> ByteRange | None:
    return part.source if isinstance(part, ProducedBytes) else part
