"""Moments of a device: of a CPU by the clock, of a GPU by events, recorded without a sync."""

from __future__ import annotations

import time
from typing import TypeAlias, Union

import torch

__all__ = ["Moment", "has_passed", "now", "seconds_between", "wait_until", "wait_within"]

# How long a rank asks a GPU again and again, and how long it sleeps from then on between two times.
_SPIN_S, _SLEEP_S = 1e-3, 5e-5

Moment: TypeAlias = Union[float, "torch.cuda.Event"]
"""Seconds of `time.perf_counter`, or an event of a GPU's stream."""


def now(device: torch.device) -> Moment:
    """Returns this moment, on a GPU that at which its stream gets here."""
    return time.perf_counter() if device.type != "cuda" else _record_event()


@torch.compiler.disable  # where a pass cannot be one graph, its parts are compiled: not this one
def _record_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def has_passed(moment: Moment) -> bool:
    """Tells whether the device has come to a moment."""
    return isinstance(moment, float) or bool(moment.query())


def wait_until(moment: Moment) -> None:
    """Waits until the device has come to a moment."""
    if not isinstance(moment, float):
        moment.synchronize()


def wait_within(moment: Moment, timeout_s: float) -> bool:
    """Waits until the device has come to a moment, and returns whether it has in time.

    Of what a GPU waits for itself, such as the messages of other ranks, the host has no other
    bound: NCCL's watchdog ends the process without a word, and sees no messages of a CUDA graph.
    """
    start_s = time.monotonic()
    while not has_passed(moment):
        waited_s = time.monotonic() - start_s
        if waited_s >= timeout_s:
            return False
        if waited_s >= _SPIN_S:
            time.sleep(_SLEEP_S)
    return True


def seconds_between(begin: Moment, end: Moment) -> float:
    """Returns the seconds between two moments of one device that have both passed."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float)
    return float(begin.elapsed_time(end)) / 1e3
