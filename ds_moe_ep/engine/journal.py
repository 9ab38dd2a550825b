"""Finished prompts of a job that has not ended, for ``--resume``: a journal per rank.

Journals lie beside the output and go when it is written; a lock among them keeps a second job away
from the output. What a result holds is in outputs.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.weights_digest import weights_digest
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.outputs import GenerateResult, Result, ScoreResult
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.errors import InputError, ResourceError
from ds_moe_ep.file_lock import is_at, open_locked

__all__ = ["Journal", "fingerprint"]

_JOB = "job.json"
_LOCK = "lock"
_RANKS = "rank-*.jsonl"
_LINE: dict[str, TypeAdapter[Any]] = {
    "generate": TypeAdapter(tuple[int, GenerateResult]),
    "score": TypeAdapter(tuple[int, ScoreResult]),
}


def fingerprint(options: JobOptions, dtype: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Returns what must be the same for results of two runs to go into one output.

    The number of ranks and the batch size are not in it: results do not depend on them. Nor is
    where the model lies: a copy on another host is the same. A few bytes of each of its weights
    stand for them (`weights_digest`).

    Raises:
        CheckpointError: The weights cannot be read.
    """
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(json.dumps([prompt.id, prompt.text, prompt.token_ids]).encode())
    fields: dict[str, Any] = {"task": options.task, "dtype": dtype, "input": digest.hexdigest()}
    fields["model"] = hashlib.sha256((options.model / "config.json").read_bytes()).hexdigest()
    fields["weights"] = weights_digest(open_checkpoint(options.model))
    if options.task == "generate":
        names = ("max_new_tokens", "temperature", "top_p", "seed")
        fields |= {name: getattr(options, name) for name in names}
    return fields


@dataclass
class Journal:
    """The journals of one output.

    Attributes:
        folder: Where they lie.
        rank: Whose journal this process writes.
    """

    folder: Path
    rank: int
    _lock: int | None = field(default=None, init=False)

    def check_free(self) -> None:
        """Finds out whether another job is writing this output.

        Raises:
            InputError: It is; who, is in the message.
        """
        descriptor = open_locked(self.folder / _LOCK, os.O_RDWR, self._in_use)
        if descriptor is not None:
            os.close(descriptor)

    def read(self, job: Mapping[str, Any]) -> dict[int, Result]:
        """Reads what an earlier run of the same job has finished; nothing if there was none.

        A line that a crash has cut short counts as not written.

        Args:
            job: The job's fingerprint.

        Returns:
            Results by the index of their prompt.

        Raises:
            InputError: The earlier run was another job, or which one it was cannot be read.
        """
        try:
            earlier = json.loads((self.folder / _JOB).read_text(encoding="utf-8"))
            if not isinstance(earlier, dict):
                raise ValueError(f"a {type(earlier).__name__} in place of an object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise _unreadable(self.folder / _JOB, error) from error
        if differing := sorted(name for name in job if earlier.get(name) != job[name]):
            told = ", ".join(f"{n} was {earlier.get(n)}, is {job[n]}" for n in differing)
            raise InputError(
                f"{self.folder}: the run to resume was another job: {told}. Use its settings, or "
                "start afresh without --resume."
            )
        paths = sorted(self.folder.glob(_RANKS))
        return dict(line for path in paths for line in _whole_lines(path, _LINE[job["task"]]))

    def start(self, job: Mapping[str, Any], *, resume: bool) -> None:
        """Takes the folder for this job, on rank 0; a run not resumed is removed.

        The other ranks call `join` then.

        Raises:
            InputError: Another job is writing this output.
            ResourceError: The disk is full, say.
        """
        with _told_if_not_writable(self.folder):
            if self._lock is None:
                self._lock = self._take()
            # Without it nobody knows of which job the journals are.
            if not resume or not (self.folder / _JOB).exists():
                for path in [self.folder / _JOB, *self.folder.glob(_RANKS)]:
                    path.unlink(missing_ok=True)
            temporary = self.folder / f".{_JOB}.{os.getpid()}"
            temporary.write_text(json.dumps(job, sort_keys=True), encoding="utf-8")
            temporary.replace(self.folder / _JOB)

    def join(self) -> None:
        """Makes the folder on a host that rank 0's is not shared with, once rank 0 has its own.

        Raises:
            ResourceError: The disk is full, say.
        """
        with _told_if_not_writable(self.folder):
            self.folder.mkdir(exist_ok=True)

    def append(self, results: Mapping[int, Result]) -> None:
        """Adds finished prompts; they are on disk when it returns.

        The folder is not made again: it would have no lock, and not say of which job it is.

        Raises:
            ResourceError: The disk is full, or the folder has gone.
        """
        path = self.folder / f"rank-{self.rank:05d}.jsonl"
        with _told_if_not_writable(path):
            if self._lock is not None and not is_at(self.folder / _LOCK, self._lock):
                raise FileNotFoundError(errno.ENOENT, "the folder is another job's now")
            with path.open("a", encoding="utf-8") as file:
                # The line end comes first: what follows a line cut short by a crash stays readable.
                lines = [json.dumps([index, asdict(result)]) for index, result in results.items()]
                file.write("\n" + "\n".join(lines))
                file.flush()
                os.fsync(file.fileno())

    def remove(self) -> None:
        """Removes the journals of all ranks, and gives the output free."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self) -> int:
        """Locks the folder until this process ends, made if it is not there."""
        descriptor = None
        while descriptor is None:
            self.folder.mkdir(exist_ok=True)
            path = self.folder / _LOCK
            descriptor = open_locked(path, os.O_RDWR | os.O_CREAT, self._in_use)
        os.truncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode())
        return descriptor

    def _in_use(self, holder: str) -> InputError:
        return InputError(
            f"{self.folder}: another job is writing this output: {holder or 'another process'}. "
            "Wait for its end, or name another file with --output."
        )


@contextlib.contextmanager
def _told_if_not_writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written on {os.uname().nodename} ({error.strerror}). Make room, or "
            "bring the folder back, and run again with --resume."
        ) from error


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path}: cannot be read ({error}), so nothing is known to be done. Put it right, or start "
        "afresh without --resume."
    )


def _whole_lines(path: Path, line_type: TypeAdapter[Any]) -> Iterator[tuple[int, Result]]:
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise _unreadable(path, error) from error
    for line in lines:
        with contextlib.suppress(ValidationError):
            yield line_type.validate_json(line)
