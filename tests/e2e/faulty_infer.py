"""launch/infer.py with one fault, as the variable FAULT says: "RANK,PHASE,STEP,WHAT".

It happens on that rank STEP passes after a phase has begun (`Progress.enter`) whose name matches
PHASE from its start; for step 0 as it begins. WHAT is a signal that the worker sends itself, or a
name below. The file FAULT_MARK is made then, which tells when. FAULT_FOLDER is the folder, or the
disk, of those that concern one. FAULT_IN names another module of the folder launch. While a rank is
killed by KILL_AMONG_READERS or KILL_BOTH_AMONG_READERS, all others read their weights.
"""

import contextlib
import importlib
import mmap
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ds_moe_ep.engine.supervisor import Progress

_RANK, _PHASE, _passes, _WHAT = os.environ["FAULT"].split(",")
_STEP = int(_passes)
_begun_at: int | None = None


def _happen() -> None:
    Path(os.environ["FAULT_MARK"]).touch()
    if _WHAT == "OUT_OF_MEMORY":
        import torch

        torch.empty(2**50)
    elif _WHAT == "RAISE":
        raise LookupError("nobody expected this prompt")
    elif _WHAT == "MOVE_FOLDER":
        _folder().rename(_folder().with_name("moved"))
    elif _WHAT == "FILL_DISK":
        _fill_disk(spare_pages=0)
    elif _WHAT == "FILL_DISK_BUT_ONE_PAGE":
        _fill_disk(spare_pages=1)
    elif _WHAT == "KILL_BOTH":
        _signal_both(signal.SIGKILL)
    elif _WHAT == "STOP_READING":
        _when_reading(lambda: os.kill(os.getpid(), signal.SIGSTOP))
    elif _WHAT == "STOP_BOTH":
        _signal_both(signal.SIGSTOP)
    elif _WHAT == "STOP_BOTH_READING":
        _when_reading(lambda: _signal_both(signal.SIGSTOP))
    elif _WHAT == "READ_SLOWLY":
        _when_reading(lambda: time.sleep(3600.0))
    elif _WHAT == "KILL_AMONG_READERS":
        _when_reading(lambda: os.kill(os.getpid(), signal.SIGKILL))
    elif _WHAT == "KILL_BOTH_AMONG_READERS":
        _when_reading(lambda: _signal_both(signal.SIGKILL))
    elif _WHAT == "CLOSE_SLOWLY":
        _close_slowly()
    elif _WHAT == "WRITE_SLOWLY":
        os.replace = lambda *args: time.sleep(3600.0)  # type: ignore[assignment]
    elif _WHAT == "KILL_AT_RENAME":  # a file is written, and not there yet
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    elif _WHAT != "NOTHING":
        os.kill(os.getpid(), signal.Signals[_WHAT])


def _folder() -> Path:
    return Path(os.environ["FAULT_FOLDER"])


def _fill_disk(spare_pages: int) -> None:
    with (_folder() / "filler").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(mmap.PAGESIZE)):
                pass
        file.truncate(file.tell() - spare_pages * mmap.PAGESIZE)


def _signal_both(number: signal.Signals) -> None:
    for pid in (os.getppid(), os.getpid()):  # the supervisor first
        os.kill(pid, number)


def _close_slowly() -> None:
    """As a monitor that sends what it has, for longer than ranks wait for one that has failed."""
    from ds_moe_ep.monitor.job_monitor import JobMonitor

    JobMonitor.close = lambda self: time.sleep(15.0)  # type: ignore[method-assign]


def _when_reading(happens: Callable[[], object]) -> None:
    """Once a rank reads its weights it has met the others, and they wait for it.

    One that was stopped and goes on (its launcher wakes it to end it) reads them.
    """
    from ds_moe_ep.engine import loading

    load = loading.load_expert_parallel_model

    def load_after(*args: Any, **options: Any) -> Any:
        happens()
        return load(*args, **options)

    loading.load_expert_parallel_model = load_after


def _enter(self: Progress, phase: str) -> None:
    global _begun_at
    enter(self, phase)
    if _begun_at is None and re.match(_PHASE, phase):
        _begun_at = self.step
        if _STEP == 0:
            _happen()


def _start_step(self: Progress, step: int) -> None:
    start_step(self, step)
    if _begun_at is not None and step == _begun_at + _STEP:
        _happen()


def _read_slowly(self: Progress, phase: str) -> None:
    enter(self, phase)
    if phase == "loading weights":
        _when_reading(lambda: time.sleep(3600.0))


if os.environ["RANK"] == _RANK:
    enter, Progress.enter = Progress.enter, _enter
    start_step, Progress.start_step = Progress.start_step, _start_step
elif _WHAT.endswith("_AMONG_READERS"):
    enter, Progress.enter = Progress.enter, _read_slowly

if __name__ == "__main__":
    command = os.environ.get("FAULT_IN", "infer")
    sys.exit(importlib.import_module(f"launch.{command}").main())
