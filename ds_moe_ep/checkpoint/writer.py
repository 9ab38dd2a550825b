"""Writes a folder of planned files: several at a time, checked, and there whole or not at all.

The files lie in ``DST.partial`` until all are done. A journal in it says which are finished, so
that a killed conversion goes on with the file it was at.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shlex
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from pydantic import ValidationError

from ds_moe_ep.checkpoint.content import copy_content, fingerprint, source_states
from ds_moe_ep.checkpoint.header import FileState
from ds_moe_ep.checkpoint.layout import PlannedFile
from ds_moe_ep.checkpoint.manifest import MANIFEST_JSON, RECORD_JSON, FileEntry
from ds_moe_ep.checkpoint.streams import HashingSink, Progress, hash_file, in_threads
from ds_moe_ep.errors import CheckpointError, some
from ds_moe_ep.file_lock import open_locked
from ds_moe_ep.whole_file import sync_folder

__all__ = ["ShowProgress", "Summary", "silently", "write_folder"]

ShowProgress = Callable[[int], AbstractContextManager[Progress]]
"""Opens a progress bar for a number of bytes."""

_JOURNAL = "unfinished.jsonl"


@dataclass(frozen=True)
class Summary:
    """The file that is written last, as it tells of all others.

    Attributes:
        name: Its path in the folder, with slashes.
        make: Returns its text from the entries of the other files, by their names.
    """

    name: str
    make: Callable[[Mapping[str, FileEntry]], str]


def silently(total_bytes: int) -> AbstractContextManager[Progress]:
    """Shows no progress."""
    return contextlib.nullcontext(lambda num_bytes: None)


def write_folder(
    folder: Path,
    weights: Sequence[PlannedFile],
    others: Sequence[PlannedFile],
    *,
    summary: Summary | None = None,
    show_progress: ShowProgress = silently,
) -> None:
    """Writes a new folder; called again after a kill, it goes on where it was.

    Every file is read again and compared with what went into it.

    Args:
        folder: What to write; it must not exist, or be empty. An empty one is replaced, so it can
            be neither a mount point nor the folder that this process is in.
        weights: The large files, written several at a time.
        others: The small ones, written after them: what has no config.json is not taken for a
            model.
        summary: The file that is written last.
        show_progress: Opens the progress bar.

    Raises:
        CheckpointError: The folder or its place is taken, two files have one name, the disk is too
            small or fails, or a source file has changed since its header was read. What is finished
            is kept.
    """
    folder = folder.resolve()
    if not folder.name:
        raise CheckpointError(
            f"{folder} is the root of all folders, which none can replace: nothing was written. "
            f"Name a new folder, such as {folder / 'model'}."
        )
    names = Counter(file.name for file in (*weights, *others))
    if summary is not None:
        names[summary.name] += 1
    if twice := [name for name, number in names.items() if number > 1]:
        raise CheckpointError(
            f"{folder} would have two files of one name ({some(twice)}): nothing was written. "
            "Rename those of the source."
        )
    try:
        with _Staging(folder, [*weights, *others]) as staging:
            total = sum(file.num_bytes for file in (*weights, *others))
            with show_progress(total) as progress:
                staging.write(weights, progress)
                staging.write(others, progress)
            if summary is not None:
                text = summary.make(staging.finished)
                last = PlannedFile(summary.name, text.encode())
                staging.write([last], lambda num_bytes: None)
            staging.check_sources()
            staging.move_into_place()
    except OSError as error:
        raise CheckpointError(
            f"{folder} could not be written: {error}. What is finished is kept: run the same "
            "command again when the cause is gone."
        ) from error


class _Staging:
    """The folder in which a conversion grows, held by one process at a time."""

    def __init__(self, target: Path, files: Sequence[PlannedFile]) -> None:
        self.finished: dict[str, FileEntry] = {}
        self._target = target
        self._folder = target.with_name(f"{target.name}.partial")
        self._files = files
        self._sources = source_states(files)
        self._stop = threading.Event()
        self._one_at_a_time = threading.Lock()

    def __enter__(self) -> _Staging:
        self._take()
        try:
            self._read_journal()
            self._remove_unfinished()
            left = sum(f.num_bytes for f in self._files if f.name not in self.finished)
            _check_space(self._target, left)
        except BaseException:
            self._journal.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._journal.close()

    def write(self, files: Sequence[PlannedFile], progress: Progress) -> None:
        """Writes those files that are not finished, or are no longer what they were."""
        for _ in in_threads(files, lambda file: self._write(file, progress), self._stop):
            pass

    def check_sources(self) -> None:
        """Refuses what was made from files that have changed.

        Raises:
            CheckpointError: With one that has; the folder does not get its name.
        """
        for path, state in self._sources.items():
            if not path.exists() or FileState.of(path) != state:
                raise CheckpointError(
                    f"{path} has changed since the conversion began, so {self._target} was not "
                    f"made. Remove {self._folder}, and run the same command again when nobody "
                    "writes the source."
                )

    def move_into_place(self) -> None:
        """Gives the folder its name. The journal goes last: a whole folder with one is whole."""
        parents = {parent for name in self.finished for parent in PurePosixPath(name).parents}
        for folder in sorted({self._folder / parent for parent in parents}, reverse=True):
            sync_folder(folder)
        self._folder.replace(self._target)
        (self._target / _JOURNAL).unlink()
        sync_folder(self._target.parent)

    def _write(self, file: PlannedFile, progress: Progress) -> None:
        path = self._folder / file.name
        entry = self.finished.get(file.name)
        if entry and path.is_file():
            if hash_file(path, lambda num_bytes: None, self._stop) == entry.sha256:
                progress(file.num_bytes)
                return
        part = path.with_name(f"{path.name}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as out:
            # One half of the progress when it is written, the other when it is read again.
            sink = HashingSink(out, lambda num_bytes: progress(num_bytes / 2), self._stop)
            write = file.make or functools.partial(copy_content, file)
            write(cast(IO[bytes], sink))
            out.flush()
            os.fsync(out.fileno())
            # From the disk, not from memory, is it to be read again.
            os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            num_bytes = out.tell()
        sha256 = sink.sha256
        if hash_file(part, lambda num_bytes: progress(num_bytes / 2), self._stop) != sha256:
            raise CheckpointError(
                f"{part}: what was read again is not what was written. Check the disk, then run "
                "the same command again."
            )
        # By the thread that finishes it, which an interrupted job waits for: a file that has its
        # name is in the journal too.
        with self._one_at_a_time:
            part.replace(path)
            self.finished[file.name] = entry = FileEntry(num_bytes=num_bytes, sha256=sha256)
            self._note({"name": file.name, **entry.model_dump()})

    def _take(self) -> None:
        """Opens the journal and locks it until this process ends, made if it is not there."""
        path = self._folder / _JOURNAL
        while True:
            _check_free(self._target)
            if not self._folder.exists():
                _check_space(self._target, sum(file.num_bytes for file in self._files))
            elif not path.is_file() and any(self._folder.iterdir()):
                raise self._taken("something else")
            self._folder.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
            descriptor = open_locked(path, flags, lambda held: self._in_use())
            if descriptor is not None:
                # What a crash has torn need not be text.
                self._journal = os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace")
                return
            # Another process has given the folder its name just now.

    def _read_journal(self) -> None:
        job = {"job": fingerprint(self._files, self._sources)}
        names = {file.name for file in self._files}
        self._journal.seek(0)
        records = list(_records(self._journal))
        if not records:
            self._note(job)
        elif records[0] != job:
            raise self._taken("an unfinished conversion of other files or for another plan")
        for record in records[1:]:
            name = record.pop("name", None)
            # The summary is made again, from the others alone.
            if isinstance(name, str) and name in names:
                with contextlib.suppress(ValidationError):
                    self.finished[name] = FileEntry.model_validate(record)

    def _note(self, record: dict[str, Any]) -> None:
        # On a line of its own, also where a kill has cut the last one short.
        self._journal.write(f"\n{json.dumps(record)}\n")
        self._journal.flush()

    def _remove_unfinished(self) -> None:
        for path in self._folder.rglob("*.part"):
            path.unlink()

    def _in_use(self) -> CheckpointError:
        return CheckpointError(
            f"{self._folder} is being written by another process. Wait for it, or end it."
        )

    def _taken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._folder} holds {what}: nothing was written. Remove it, or name another folder "
            f"than {self._target}."
        )


def _records(journal: IO[str]) -> Iterator[dict[str, Any]]:
    """Yields the lines of a journal but empty ones and those that a crash has torn."""
    for line in journal:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict):
                yield record


def _check_free(target: Path) -> None:
    """Refuses what holds something, or what cannot be replaced by a folder made beside it."""
    if not target.exists():
        return
    quoted = shlex.quote(str(target))
    if not target.is_dir() or any(target.iterdir()):
        can_be_checked = any((target / name).is_file() for name in (MANIFEST_JSON, RECORD_JSON))
        check = (
            f", or check this one: ds-moe-ep convert {quoted} --verify" if can_be_checked else ""
        )
        raise CheckpointError(
            f"{target} exists and is not empty: nothing was written. Name a new folder{check}."
        )
    is_current = target.samefile(os.curdir)
    if is_current or os.path.ismount(target):
        what = "the folder that you are in" if is_current else "a mount point"
        raise CheckpointError(
            f"{target} is {what}, which the finished folder cannot replace: nothing was written. "
            f"Name a new folder, such as {target / 'model'}."
        )


def _check_space(target: Path, needed_bytes: int) -> None:
    existing = next(folder for folder in target.parents if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if needed_bytes > free_bytes:
        raise CheckpointError(
            f"{target} needs {needed_bytes:,} bytes, but its disk has {free_bytes:,} free: "
            f"{needed_bytes - free_bytes:,} too few. Free them, or name a folder on another disk."
        )
