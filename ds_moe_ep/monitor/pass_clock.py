"""Splits the time of forward passes into parts: attention, router, dispatch, and so on.

It keeps times; which module is which part is settled in recorder.py.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.dist.moments import Moment, has_passed, now, seconds_between, wait_until
from ds_moe_ep.monitor.metrics_format import PARTS, PASS_KINDS

__all__ = ["PassClock", "PassesOfKind"]

# Decode passes are short and many: to look at the clock at each part of all would show in them.
# The first is not looked at: where it sets up what all later ones find there, on a GPU above all,
# it takes as long as dozens of them, and stands for none.
_EVERY, _FIRST = 8, 2


@dataclass
class PassesOfKind:
    """The passes of one kind.

    Attributes:
        count: All of them.
        durations: How long each took.
        parts_s: Seconds in each part of those that were split.
    """

    count: int = 0
    durations: Durations = field(default_factory=Durations)
    parts_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def estimated_parts_s(self) -> dict[str, float]:
        """Returns seconds in each part of all passes, as if all were like those that were split."""
        split_s = sum(self.parts_s.values())
        factor = self.durations.total_s / split_s if split_s else 0.0
        return {part: seconds * factor for part, seconds in self.parts_s.items()}


@dataclass
class _Pass:
    kind: str
    begun: Moment
    is_split: bool
    parts: list[tuple[str, Moment]] = field(default_factory=list)  # each with its end


class PassClock:
    """Times every pass, and splits some: at any moment of those it is in one part.

    Args:
        device: Where passes run: by the clock on a CPU, by events without a sync on a GPU.
        splits_decode: Whether decode passes tell their parts; replays of a CUDA graph do not.
    """

    def __init__(self, device: torch.device, *, splits_decode: bool = True) -> None:
        self.times = {kind: PassesOfKind() for kind in PASS_KINDS}
        self._device = device
        self._splits_decode = splits_decode
        self._current: _Pass | None = None
        self._part = "other"
        self._unfinished: deque[_Pass] = deque()

    def start(self, kind: str) -> bool:
        """Begins a pass of the kind ``prefill`` or ``decode``.

        Returns:
            Whether it is split: every prefill is, and of decode passes the second, the tenth, ...
        """
        times = self.times[kind]
        times.count += 1
        is_split = kind == "prefill" or (self._splits_decode and times.count % _EVERY == _FIRST)
        self._current, self._part = _Pass(kind, now(self._device), is_split), "other"
        return is_split

    def enter(self, part: str) -> None:
        """Says in which part a pass that is split is from now on."""
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
            for part, end in ended.parts if ended.is_split else ():
                times.parts_s[part] += seconds_between(moment, end)
                moment = end
            times.durations.add(seconds_between(ended.begun, ended.parts[-1][1]))
