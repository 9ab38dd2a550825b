"""A rank is two processes: a worker that does the job, and this one, which outlives it.

So whatever ends a worker, somebody on its host is left to say where it was; and no rank outlives
the launcher that started it. The supervisor is forked off before torch is imported, so it is small;
it knows nothing of models and waits for nothing but its worker.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

__all__ = ["INTERRUPTED", "Progress", "supervise", "what_is_kept"]

INTERRUPTED = 130
"""Exit code of a job that was told to stop."""

_STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# How often each of the two processes looks whether the one above it is still there.
_LOOK_S = 1.0
# A signal that was sent to both processes has reached both after this time.
_BOTH_S = 0.5
# Beyond a bound, a supervisor asks this often whether there is still a job, and as long each time.
_ASK_S = 5.0
# DeepSpeed's launcher on a host, and what starts it, by the names they are installed under.
_LAUNCHER = "deepspeed.launcher.launch"
_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")


class Progress:
    """Where a rank is, written by its worker into memory that its supervisor reads."""

    _HEAD = struct.Struct("qq")  # the step, and the length of the phase's name, which follows

    def __init__(self, phase: str) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forked processes
        self.enter(phase)

    def enter(self, phase: str) -> None:
        """Names what the rank does from now on: "loading weights"."""
        text = phase.encode()[: mmap.PAGESIZE - self._HEAD.size]
        self._memory[self._HEAD.size : self._HEAD.size + len(text)] = text
        self._HEAD.pack_into(self._memory, 0, self._head()[0], len(text))

    def start_step(self, step: int) -> None:
        """Counts forward passes, from 1 on."""
        self._HEAD.pack_into(self._memory, 0, step, self._head()[1])

    @property
    def step(self) -> int:
        """The forward pass that the rank is in; 0 before the first."""
        return self._head()[0]

    def __str__(self) -> str:
        """Says where the rank is."""
        step, length = self._head()
        phase = self._memory[self._HEAD.size : self._HEAD.size + length].decode(errors="replace")
        return f"{phase}, step {step}" if step else phase

    def _head(self) -> tuple[int, int]:
        step, length = self._HEAD.unpack_from(self._memory)
        return step, length


def supervise(
    work: Callable[[Progress], int],
    *,
    name: str,
    is_rank_0: bool,
    kept: Path | None,
    start_patience_s: float = math.inf,
    patience_s: float = math.inf,
) -> int:
    """Runs a worker until it ends, is told to stop, or its launcher or its job has gone.

    Args:
        work: What the worker does; returns its exit code.
        name: Names the rank in messages: "rank 3 worker-1".
        is_rank_0: Whether this rank tells the user that the job was interrupted. It also holds the
            store of the ranks, which tells the others that there is a job.
        kept: Folder in which finished prompts are kept; None if they are not.
        start_patience_s: For how long a worker may stand where it is before its first pass.
        patience_s: And later. What other ranks wait for it, and what they take to say so.

    Returns:
        The exit code of `work`; 1 if a signal ended the worker, which is told; 1 without a word if
        the job has ended without it; 130 if this process was told to stop, or its launcher has
        gone.
    """
    progress = Progress("the start")
    launcher = _Launcher.of_this_process()
    # A job started in the background or with nohup has some of them ignored, and goes on.
    stops: set[int] = {each for each in _STOPS if signal.getsignal(each) != signal.SIG_IGN}
    watched: set[int] = {*stops, signal.SIGCHLD, signal.SIGCONT}
    signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    lifeline, end_held_here = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(end_held_here)
        for each in stops:
            signal.signal(each, signal.SIG_DFL)  # Python's own for SIGINT is an exception
        signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
        _follow_supervisor(lifeline, name, progress, launcher)
        _leave(work(progress))
    os.close(lifeline)
    patience = _Patience(progress, start_patience_s, patience_s, is_rank_0)
    code, why = _watch(worker, stops, watched, launcher, patience)
    if code not in (0, INTERRUPTED):
        launcher.wake_stopped_ranks()
    if why and code != INTERRUPTED:
        _say(f"DistributedError: [{name}] was ended by {why} at {progress}.{what_is_kept(kept)}")
    elif why and is_rank_0:
        _say(f"interrupted ({why}) at {progress}.{what_is_kept(kept)}")
    return code


def _watch(
    worker: int, stops: set[int], watched: set[int], launcher: _Launcher, patience: _Patience
) -> tuple[int, str]:
    """Waits for the end of a worker, and ends it if this process is to stop.

    Returns:
        The exit code, and what the user is to hear of; "" for nothing.
    """
    while True:
        number = _next_of(watched, _LOOK_S)
        pid, status = os.waitpid(worker, os.WNOHANG)
        if pid and os.WIFEXITED(status):
            return os.WEXITSTATUS(status), ""
        if pid and os.WTERMSIG(status) in stops and number not in stops:
            number = _next_of(stops, _BOTH_S)  # sent to both, and the worker was quicker?
        has_gone = launcher.has_gone()
        if number in stops or has_gone:
            if not pid:
                os.kill(worker, signal.SIGKILL)
                os.waitpid(worker, 0)
            if number in stops and number != signal.SIGTERM:
                return INTERRUPTED, signal.Signals(number).name
            # By SIGTERM the launcher ends the others of a broken job, which is no news, and those
            # of a job whose `deepspeed` has gone, if another rank saw that first.
            return INTERRUPTED, "its launcher has gone" if has_gone else ""
        if pid:
            return 1, signal.Signals(os.WTERMSIG(status)).name
        if number == signal.SIGCONT:
            os.kill(worker, signal.SIGCONT)
        elif (why := patience.is_over(worker)) is not None:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            return 1, why


class _Patience:
    """Notices that a worker stands still and that the others have given it up.

    DeepSpeed's launcher on another host does not hear of that, nor does a worker that is stopped.

    Args:
        progress: Where the worker is.
        start_limit_s: For how long it may stand there before its first pass.
        limit_s: And later.
        is_rank_0: Whether the store that others ask for is its own.
    """

    def __init__(
        self, progress: Progress, start_limit_s: float, limit_s: float, is_rank_0: bool
    ) -> None:
        self._progress, self._limits_s = progress, (start_limit_s, limit_s)
        self._is_rank_0 = is_rank_0
        self._place, self._stood_s = "", 0.0

    def is_over(self, worker: int) -> str | None:
        """Is asked at each look; by those, since a clock goes on while both are stopped.

        Returns:
            What the user is to hear of it, "" for nothing: the others have said it. None to go on.
        """
        place = str(self._progress)
        self._stood_s = self._stood_s + _LOOK_S if place == self._place else 0.0
        self._place = place
        beyond_s = self._stood_s - self._limits_s[self._progress.step > 0]
        if beyond_s < 0 or beyond_s % _ASK_S >= _LOOK_S:
            return None
        if self._is_rank_0:  # the system takes calls in the name of a process that is stopped
            is_stopped = _state_and_parent(worker)[0] == "T"
            return f"its supervisor, stopped for {self._stood_s:.0f} s," if is_stopped else None
        return None if _store_answers() else ""


def _store_answers() -> bool:
    """Returns whether rank 0, which holds the store of the ranks, is there."""
    where = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        socket.create_connection(where, timeout=_ASK_S).close()
    except OSError:
        return False
    return True


@dataclass(frozen=True)
class _Launcher:
    """DeepSpeed's launcher on this host, if that is what started this process.

    Of others, a shell say, nothing is known: they may go while the job goes on.

    Attributes:
        pid: The launcher; None for another.
        runner: The process of the ``deepspeed`` command, if that is here too.
    """

    pid: int | None = None
    runner: int | None = None

    @classmethod
    def of_this_process(cls) -> _Launcher:
        pid = os.getppid()
        if _LAUNCHER not in _command(pid):
            return cls()
        _, runner = _state_and_parent(pid)
        is_runner = any(Path(word).name in _RUNNERS for word in _command(runner)[:4])
        return cls(pid, runner if is_runner else None)

    def has_gone(self) -> bool:
        if self.pid is None:
            return False
        if os.getppid() != self.pid:
            return True
        return self.runner is not None and _state_and_parent(self.pid)[1] != self.runner

    def wake_stopped_ranks(self) -> None:
        """Lets stopped ranks take the launcher's SIGTERM: it would wait for them for 30 s."""
        if self.pid is None:
            return
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
            if _state_and_parent(pid) == ("T", self.pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        """Has the launcher end all ranks on this host, and itself with exit code 1."""
        if self.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)


def _follow_supervisor(lifeline: int, name: str, progress: Progress, launcher: _Launcher) -> None:
    """Makes the worker stop when its supervisor is stopped, and end when that has ended.

    Args:
        lifeline: Can be read when the supervisor has ended.
        name: Names the rank.
        progress: Where it is.
        launcher: To be told.
    """
    supervisor = os.getppid()

    def follow() -> None:
        while not select.select([lifeline], [], [], _LOOK_S)[0]:
            if _state_and_parent(supervisor)[0] == "T":
                os.kill(os.getpid(), signal.SIGSTOP)
        _say(f"DistributedError: [{name}] lost process {supervisor} at {progress}: it was killed.")
        launcher.end()
        os._exit(1)

    threading.Thread(target=follow, name="follow-supervisor", daemon=True).start()


def _leave(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the interpreter's orderly shutdown can wait for ranks that wait for this one,
    # and races with the threads of torch's backends (seen: an abort after a finished job).
    os._exit(code)


def _next_of(signals: set[int], timeout_s: float) -> int | None:
    caught = signal.sigtimedwait(signals, timeout_s)
    return caught.si_signo if caught else None


def what_is_kept(folder: Path | None) -> str:
    """Returns a sentence on what an ended job leaves in its folder; none before it has one."""
    if folder is None or not folder.exists():
        return ""
    return f" Finished prompts are in {folder}: go on with --resume."


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone too
        os.write(2, f"{message}\n".encode(errors="replace"))


def _state_and_parent(pid: int) -> tuple[str, int]:
    """Returns a process's state, "T" if it is stopped, and parent; ("", 0) if there is none."""
    stat = _read_proc(pid, "stat").decode(errors="replace")
    if not stat:
        return "", 0
    state, parent = stat.rpartition(")")[2].split()[:2]  # the name before may hold anything
    return state, int(parent)


def _command(pid: int) -> list[str]:
    return [os.fsdecode(word) for word in _read_proc(pid, "cmdline").split(b"\0")]


def _read_proc(pid: int, name: str) -> bytes:
    """Reads what the kernel tells of a process; nothing if there is none."""
    try:
        # In a container /proc may be that of another one, where numbers mean other processes.
        if os.readlink("/proc/self") == str(os.getpid()):
            return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        pass
    return b""
