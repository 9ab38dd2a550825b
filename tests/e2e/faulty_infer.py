"""launch/infer.py with one fault, as the variable FAULT says: "RANK,PHASE,STEP,WHAT".

It happens on that rank in the phase whose name begins so (`Progress.enter`), for step 0 as it
begins. WHAT is a signal that the worker sends itself, or a name below. The file FAULT_MARK is made
then, which tells when. FAULT_IN names another module of the folder launch.
"""

import contextlib
import importlib
import mmap
import os
import shutil
import signal
import sys
from pathlib import Path

from ds_moe_ep.engine.supervisor import Progress

_RANK, _PHASE, _STEP, _WHAT = os.environ["FAULT"].split(",")


def _happen() -> None:
    Path(os.environ["FAULT_MARK"]).touch()
    if _WHAT == "OUT_OF_MEMORY":
        import torch

        torch.empty(2**50)
    elif _WHAT == "RAISE":
        raise LookupError("nobody expected this prompt")
    elif _WHAT == "REMOVE_FOLDER":
        shutil.rmtree(_output().parent)
    elif _WHAT == "FILL_DISK":
        _fill_disk(_output().with_name("filler"))
    elif _WHAT == "KILL_BOTH":
        os.kill(os.getppid(), signal.SIGKILL)  # the supervisor
        os.kill(os.getpid(), signal.SIGKILL)
    elif _WHAT != "NOTHING":
        os.kill(os.getpid(), signal.Signals[_WHAT])


def _output() -> Path:
    last = max(i for i, word in enumerate(sys.argv) if word == "--output")
    return Path(sys.argv[last + 1])


def _fill_disk(filler: Path) -> None:
    """Leaves one page."""
    with filler.open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while file.write(bytes(mmap.PAGESIZE)):
                pass
        file.truncate(file.tell() - mmap.PAGESIZE)


def _enter(self: Progress, phase: str) -> None:
    enter(self, phase)
    if _STEP == "0" and phase.startswith(_PHASE):
        _happen()


def _start_step(self: Progress, step: int) -> None:
    start_step(self, step)
    if step == int(_STEP) and str(self).startswith(_PHASE):
        _happen()


if os.environ["RANK"] == _RANK:
    enter, Progress.enter = Progress.enter, _enter
    start_step, Progress.start_step = Progress.start_step, _start_step

if __name__ == "__main__":
    command = os.environ.get("FAULT_IN", "infer")
    sys.exit(importlib.import_module(f"launch.{command}").main())
