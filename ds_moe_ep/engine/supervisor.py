"""A rank is two processes: a worker that does the job, and this one, which outlives it.

So whatever ends a worker, somebody on its host is left to say where it was; and no rank outlives
the launcher that started it. The supervisor is forked off before torch is imported, so it is small;
it knows nothing of models and waits for nothing but its worker.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import mmap
import os
import select
import signal
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from ds_moe_ep.engine.launcher import Launcher, is_stopped

__all__ = ["INTERRUPTED", "Progress", "supervise", "wake_after", "what_is_kept"]

INTERRUPTED = 130
"""Exit code of a job that was told to stop."""

_STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
# How often each of the two processes looks whether the one above it is still there.
_LOOK_S = 1.0
# A signal that was sent to both processes has reached both after this time.
_BOTH_S = 0.5
# Beyond a bound, a supervisor asks this often whether there is still a job, and as long each time.
_ASK_S = 5.0
# Descriptors in a message; Linux takes no more than 253.
_PASSED = 250
# SIGCONT from the kernel, as `wake_after` asks of it, and not from a user.
_OTHERS_HAVE_ENDED = -1


class Progress:
    """Where a rank is, written by its worker into memory that its supervisor reads."""

    _HEAD = struct.Struct("qq")  # the step, and the length of the phase's name, which follows

    def __init__(self, phase: str) -> None:
        self._memory = mmap.mmap(-1, mmap.PAGESIZE)  # shared with forked processes
        self._take, self._give = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        for each in (self._take, self._give):
            each.setblocking(False)
        self.enter(phase)

    def enter(self, phase: str) -> None:
        """Names what the rank does from now on: "loading weights"."""
        text = phase.encode()[: mmap.PAGESIZE - self._HEAD.size]
        self._memory[self._HEAD.size : self._HEAD.size + len(text)] = text
        self._HEAD.pack_into(self._memory, 0, self._head()[0], len(text))

    def start_step(self, step: int) -> None:
        """Counts forward passes, from 1 on."""
        self._HEAD.pack_into(self._memory, 0, step, self._head()[1])

    def share(self, connections: Sequence[int]) -> None:
        """Shares connections to other ranks with the supervisor, for `say_end_is_seen`.

        They are open until both processes have ended, so others do not see the end of a worker
        before its supervisor has spoken.

        Args:
            connections: Their descriptors.
        """
        with contextlib.suppress(OSError):  # more than the system keeps: others may say it too
            for first in range(0, len(connections), _PASSED):
                passed = connections[first : first + _PASSED]
                socket.send_fds(self._give, [b"\0"], passed)

    def say_end_is_seen(self) -> None:
        """Tells other ranks that somebody here knows why this one ends, and has told the user."""
        with contextlib.suppress(OSError):  # there are no more
            while passed := socket.recv_fds(self._take, 1, _PASSED)[1]:
                for each in passed:
                    with contextlib.suppress(OSError):
                        os.write(each, b"\0")

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
        patience_s: And later, or be stopped at any time. What other ranks wait for it, and what
            they take to say so.

    Returns:
        The exit code of `work`; 1 if a signal ended the worker, which is told; 1 without a word if
        the job has ended without it; 130 if this process was told to stop, or its launcher has
        gone.
    """
    progress = Progress("the start")
    launcher = Launcher.of_this_process()
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
    progress.say_end_is_seen()
    return code


def _watch(
    worker: int, stops: set[int], watched: set[int], launcher: Launcher, patience: _Patience
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
            continue
        is_forgotten = number == _OTHERS_HAVE_ENDED and is_stopped(worker)
        why = "" if is_forgotten else patience.is_over(worker)
        if why is not None:
            os.kill(worker, signal.SIGKILL)
            os.waitpid(worker, 0)
            return 1, why


class _Patience:
    """Notices that a worker stands still and that the others have given it up.

    DeepSpeed's launcher on another host does not hear of that, nor does a worker that is stopped.
    And ranks that have not met yet wait long for one that was stopped, and cannot tell its name.

    All is counted by looks, since a clock goes on while a job is stopped that is to go on (Ctrl-Z).

    Args:
        progress: Where the worker is.
        start_limit_s: For how long it may stand there before its first pass.
        limit_s: And later; for how long it may be stopped, at any time.
        is_rank_0: Whether the store that others ask for is its own.
    """

    def __init__(
        self, progress: Progress, start_limit_s: float, limit_s: float, is_rank_0: bool
    ) -> None:
        self._progress = progress
        self._start_limit_s, self._limit_s = start_limit_s, limit_s
        self._is_rank_0 = is_rank_0
        self._place, self._stood_s = "", 0.0
        self._stopped_s = 0.0

    def is_over(self, worker: int) -> str | None:
        """Is asked at each look.

        Returns:
            What the user is to hear of it, "" for nothing: the others have said it. None to go on.
        """
        self._stopped_s = self._stopped_s + _LOOK_S if is_stopped(worker) else 0.0
        # In passes the others say it, but for rank 0: the system takes calls in its name.
        if self._stopped_s >= self._limit_s and (self._progress.step == 0 or self._is_rank_0):
            return f"its supervisor, stopped for {self._limit_s:.0f} s,"
        return self._is_over_for_others()

    def _is_over_for_others(self) -> str | None:
        place = str(self._progress)
        self._stood_s = self._stood_s + _LOOK_S if place == self._place else 0.0
        self._place = place
        limit_s = self._limit_s if self._progress.step else self._start_limit_s
        beyond_s = self._stood_s - limit_s
        if self._is_rank_0 or beyond_s < 0 or beyond_s % _ASK_S >= _LOOK_S:
            return None
        return None if _store_answers() else ""


def wake_after(connection: socket.socket) -> None:
    """Has the kernel wake a worker's supervisor when the other end has gone; the worker calls it.

    A supervisor that finds its worker stopped then ends it: the job is over.

    Args:
        connection: Over which nothing is sent before.
    """
    fcntl.fcntl(connection, fcntl.F_SETOWN, os.getppid())
    fcntl.fcntl(connection, fcntl.F_SETSIG, signal.SIGCONT)
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)


def _store_answers() -> bool:
    """Returns whether rank 0, which holds the store of the ranks, is there."""
    where = os.environ.get("MASTER_ADDR", ""), int(os.environ.get("MASTER_PORT", "0"))
    try:
        socket.create_connection(where, timeout=_ASK_S).close()
    except OSError:
        return False
    return True


def _follow_supervisor(lifeline: int, name: str, progress: Progress, launcher: Launcher) -> None:
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
            if is_stopped(supervisor):
                os.kill(os.getpid(), signal.SIGSTOP)
        _say(f"DistributedError: [{name}] lost process {supervisor} at {progress}: it was killed.")
        progress.say_end_is_seen()
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
    if caught and caught.si_signo == signal.SIGCONT and caught.si_code > 0:  # not from a process
        return _OTHERS_HAVE_ENDED
    return caught.si_signo if caught else None


def what_is_kept(folder: Path | None) -> str:
    """Returns a sentence on what an ended job leaves in its folder; none before it has one."""
    if folder is None or not folder.exists():
        return ""
    return f" Finished prompts are in {folder}: go on with --resume."


def _say(message: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may have gone too
        os.write(2, f"{message}\n".encode(errors="replace"))
