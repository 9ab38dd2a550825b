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
    _since: float | torch.cuda.Event | None = None

    @contextmanager
    def timed(self, device: torch.device, sent_bytes: int) -> Iterator[None]:
        """Times one collective: by the clock on a CPU, by events without a sync on a GPU.

        In a compiled pass nothing is counted: it would be compiled anew for each new count.
        """
        if torch.compiler.is_compiling():
            yield
            return
        self.calls += 1
        self.sent_bytes += sent_bytes
        self._resume(device)
        yield
        self._pause(device)

    @contextmanager
    def untimed(self, device: torch.device) -> Iterator[None]:
        """Leaves other work out of the time of the collective that it is done in."""
        self._pause(device)
        yield
        self._resume(device)

    def seconds(self) -> float:
        """Seconds in collectives so far, waiting for slower ranks included; synchronises a GPU."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._seconds

    def reset(self) -> None:
        """Forgets what was counted so far."""
        self.calls, self.sent_bytes, self._seconds = 0, 0, 0.0
        self._events.clear()

    def _resume(self, device: torch.device) -> None:
        self._since = _now(device)

    def _pause(self, device: torch.device) -> None:
        since, now = self._since, _now(device)
        if isinstance(since, float) and isinstance(now, float):
            self._seconds += now - since
        elif isinstance(since, torch.cuda.Event) and isinstance(now, torch.cuda.Event):
            self._events.append((since, now))


def _now(device: torch.device) -> float | torch.cuda.Event | None:
    if device.type != "cuda":
        return time.perf_counter()
    if torch.cuda.is_current_stream_capturing():
        return None  # a captured collective has no time of its own
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
