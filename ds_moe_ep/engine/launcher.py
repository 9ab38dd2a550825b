"""DeepSpeed's launcher on this host and the ranks it has started, seen through /proc.

It tells what there is and passes signals on; what they are sent for is the supervisor's business.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Launcher", "is_stopped"]

# DeepSpeed's launcher on a host, and what starts it, by the names they are installed under.
_LAUNCHER = "deepspeed.launcher.launch"
_RUNNERS = ("deepspeed", "deepspeed.pt", "ds", "deepspeed.launcher.runner")


@dataclass(frozen=True)
class Launcher:
    """DeepSpeed's launcher on this host, if that is what started this process.

    Of others, a shell say, nothing is known: they may go while the job goes on.

    Attributes:
        pid: The launcher; None for another.
        runner: The process of the ``deepspeed`` command, if that is here too.
    """

    pid: int | None = None
    runner: int | None = None

    @classmethod
    def of_this_process(cls) -> Launcher:
        """Returns the launcher that started this process."""
        pid = os.getppid()
        if _LAUNCHER not in _command(pid):
            return cls()
        _, runner = _state_and_parent(pid)
        is_runner = any(Path(word).name in _RUNNERS for word in _command(runner)[:4])
        return cls(pid, runner if is_runner else None)

    def has_gone(self) -> bool:
        """Returns whether it, or the ``deepspeed`` command above it, has ended."""
        if self.pid is None:
            return False
        if os.getppid() != self.pid:
            return True
        return self.runner is not None and _state_and_parent(self.pid)[1] != self.runner

    def wake_stopped_ranks(self) -> None:
        """Lets stopped ranks take the launcher's SIGTERM: it would wait for them for 30 s.

        They are known by their supervisors: a supervisor's worker stops with it.
        """
        if self.pid is None:
            return
        for pid in map(int, _read_proc(self.pid, f"task/{self.pid}/children").split()):
            if is_stopped(pid):
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)

    def end(self) -> None:
        """Has the launcher end all ranks on this host, and itself with exit code 1."""
        if self.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGTERM)


def is_stopped(pid: int) -> bool:
    """Returns whether a process is there and stopped (SIGSTOP, SIGTSTP)."""
    return _state_and_parent(pid)[0] == "T"


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
