"""What the collectives of a rank cost: how many, how many bytes, how long."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

__all__ = ["CommStats"]


@dataclass
class CommStats:
    """What the collectives of one rank cost so far.

    Attributes:
        calls: Number of collectives started.
        sent_bytes: Bytes that left this rank for another one (rows that stay here are not counted).
    """

    calls: int = 0
    sent_bytes: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def timed(self, device: torch.device, sent_bytes: int) -> Iterator[None]:
        """Times one collective: by the clock on a CPU, by events without a sync on a GPU."""
        self.calls += 1
        self.sent_bytes += sent_bytes
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        elif torch.cuda.is_current_stream_capturing():
            yield  # a captured collective has no time of its own
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))

    def seconds(self) -> float:
        """Seconds in collectives so far, waiting for slower ranks included; synchronises a GPU."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._seconds
