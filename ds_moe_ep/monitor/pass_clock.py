"""Splits the time of forward passes into parts: attention, router, dispatch, and so on.

It keeps times; which module is which part is settled in recorder.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.dist.moments import Moment, has_passed, now, seconds_between, wait_until
from ds_moe_ep.monitor.metrics_format import PARTS

__all__ = ["PassClock", "PassTimes"]

# On a GPU each part takes two events, and their launches would show in short passes.
_GPU_EVERY = 8


@dataclass
class PassTimes:
    """The passes of one kind.

    Attributes:
        count: All of them.
        durations: Of those that were measured.
        parts_s: Seconds of those in each part.
    """

    count: int = 0
    durations: Durations = field(default_factory=Durations)
    parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def estimated_parts_s(self) -> dict[str, float]:
        """Returns seconds in each part in all passes, as if the others were like the measured."""
        factor = self.count / self.durations.count if self.durations.count else 0.0
        return {part: seconds * factor for part, seconds in self.parts_s.items()}


@dataclass
class _Pass:
    kind: str
    begun: Moment
    parts: list[tuple[str, Moment]] = field(default_factory=list)  # each with its end


class PassClock:
    """At any moment of a pass it is in one part; switching costs a look at the clock.

    Args:
        device: Where passes run: by the clock on a CPU, by events without a sync on a GPU, and
            there one pass in eight, but every prefill.
    """

    def __init__(self, device: torch.device) -> None:
        self.times: dict[str, PassTimes] = {"prefill": PassTimes(), "decode": PassTimes()}
        self._device = device
        self._current: _Pass | None = None
        self._part = "other"
        self._unfinished: deque[_Pass] = deque()

    def start(self, kind: str) -> None:
        """Begins a pass of the kind ``prefill`` or ``decode``."""
        times = self.times[kind]
        times.count += 1
        if self._device.type == "cuda" and kind == "decode" and times.count % _GPU_EVERY != 1:
            return
        self._current, self._part = _Pass(kind, now(self._device)), "other"

    def enter(self, part: str) -> None:
        """Says in which part the pass is from now on."""
        if self._current is not None and part != self._part:
            self._current.parts.append((self._part, now(self._device)))
            self._part = part

    def stop(self) -> None:
        """Ends the pass."""
        if self._current is None:
            return
        self._current.parts.append((self._part, now(self._device)))
        self._unfinished.append(self._current)
        self._current = None
        self._read()

    def finish(self) -> None:
        """Counts what a GPU was not through with."""
        if self._unfinished:
            wait_until(self._unfinished[-1].parts[-1][1])
        self._read()

    def _read(self) -> None:
        while self._unfinished and has_passed(self._unfinished[0].parts[-1][1]):
            ended = self._unfinished.popleft()
            times = self.times[ended.kind]
            moment = ended.begun
            for part, end in ended.parts:
                times.parts_s[part] += seconds_between(moment, end)
                moment = end
            times.durations.add(seconds_between(ended.begun, moment))
