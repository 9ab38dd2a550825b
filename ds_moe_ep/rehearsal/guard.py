"""Work of which nothing is left, however it ends: no process and no file.

Above the work is a guard, a process that outlives it and whoever wants it. Processes whose parent
ends fall to the guard, so it finds and ends them all, also those in namespaces and sessions of
their own. Then it removes their folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

__all__ = ["go_on_guarded"]

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_STOPS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def go_on_guarded(prefix: str) -> Path:
    """Goes on in another process, of which nothing is left however that one or this one ends.

    Only the other one returns from here. This one waits for it and exits with its exit code; told
    to stop or killed, it takes the other one with it. Call it before anything is open or running
    that must not be there twice.

    Args:
        prefix: The name of the folder begins so.

    Returns:
        A new folder for temporary files.

    Raises:
        SystemExit: In this process, with the exit code of the other one.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    lifeline, held_here = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(held_here)
        return _guard(lifeline, prefix)
    os.close(lifeline)
    try:
        _, status = os.waitpid(guard, 0)
    except BaseException:
        os.close(held_here)
        os.waitpid(guard, 0)
        raise
    sys.exit(os.waitstatus_to_exitcode(status))


def _guard(lifeline: int, prefix: str) -> Path:
    """Starts the worker, in which this returns, and ends with it or with the lifeline."""
    code = 1
    try:
        os.setsid()  # Ctrl-C is for the process above, which tells by its end
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPS)
        if ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
            raise OSError("this system does not give orphans to a process that asks for them")
        os.close(os.pidfd_open(os.getpid()))  # where it fails, before there is a worker to watch
        folder = Path(tempfile.mkdtemp(prefix=prefix))
        worker = os.fork()
        if worker == 0:
            os.close(lifeline)
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            return folder
        ended = os.pidfd_open(worker)
        is_over = ended in select.select([lifeline, ended], [], [])[0]
        code = os.waitstatus_to_exitcode(_end_all(worker))
        shutil.rmtree(folder)
        if code < 0:
            if is_over:
                name = signal.Signals(-code).name
                print(f"DistributedError: ended by {name}; nothing is left.", file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(code)


def _end_all(worker: int) -> int:
    """Ends all processes below this one, and returns the worker's status.

    Each time around those whose parents have ended are this one's own.
    """
    status_of: dict[int, int] = {}
    while True:
        for pid in _children():
            os.kill(pid, signal.SIGKILL)  # it has its number until it is waited for
        try:
            pid, status = os.waitpid(-1, 0)
            while pid:
                status_of[pid] = status
                pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status_of[worker]


def _children() -> Iterator[int]:
    """Yields the processes whose parent is this one."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            # Behind the command's name, which is in brackets and may hold anything.
            _, parent, *_ = path.read_text(errors="replace").rpartition(")")[2].split()
            if int(parent) == os.getpid():
                yield int(path.parent.name)
