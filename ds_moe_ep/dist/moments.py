"""Moments of a device: of a CPU by the clock, of a GPU by events, recorded without a sync."""

from __future__ import annotations

import time
from typing import TypeAlias, Union

import torch

from ds_moe_ep.errors import DistributedError

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


def wait_within(moment: Moment, timeout_s: float, not_done: str) -> None:
    """Waits until the device has come to a moment for which it waits for other ranks.

    Of what a GPU waits for itself, such as the messages of other ranks, the host has no other
    bound: NCCL's watchdog ends the process without a word, and sees no messages of a CUDA graph.

    Args:
        moment: The moment.
        timeout_s: How long it may take.
        not_done: What has not been then, for the message: "a replayed pass was not done".

    Raises:
        DistributedError: It took longer.
    """
    start_s = time.monotonic()
    while not has_passed(moment):
        waited_s = time.monotonic() - start_s
        if waited_s >= timeout_s:
            raise DistributedError(
                f"{not_done} within {timeout_s:g} s: another rank is hung, has ended, or is much "
                "slower than this one."
            )
        if waited_s >= _SPIN_S:
            time.sleep(_SLEEP_S)


def seconds_between(begin: Moment, end: Moment) -> float:
    """Returns the seconds between two moments of one device that have both passed."""
    if isinstance(begin, float) and isinstance(end, float):
        return end - begin
    assert not isinstance(begin, float)
    return float(begin.elapsed_time(end)) / 1e3
