"""What the collectives of a rank cost, by kind: how many, how many bytes, how long."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.dist.moments import Moment, has_passed, now, seconds_between, wait_until

__all__ = ["CommStats", "KindStats"]


@dataclass
class KindStats:
    """What the collectives of one kind cost.

    Attributes:
        sent_bytes: Bytes that left this rank for another one (rows that stay here are not counted).
        durations: How long each took, waiting for slower ranks included.
    """

    sent_bytes: int = 0
    durations: Durations = field(default_factory=Durations)


@dataclass
class _Collective:
    """One that is on its way.

    Attributes:
        kind: See `CommStats.timed`.
        since: When its time began to count, before anything else was done meanwhile or after that.
        spans: The times that have counted so far.
    """

    kind: str
    since: Moment
    spans: list[tuple[Moment, Moment]] = field(default_factory=list)


class CommStats:
    """What the collectives of one rank cost so far."""

    def __init__(self) -> None:
        self._kinds: defaultdict[str, KindStats] = defaultdict(KindStats)
        self._current: _Collective | None = None
        self._unfinished: deque[_Collective] = deque()  # on a GPU, whose clock is read later

    @property
    def by_kind(self) -> dict[str, KindStats]:
        """The costs by kind; waits for a GPU to finish what it was given."""
        while self._unfinished:
            wait_until(self._unfinished[0].spans[-1][1])
            self._read_clocks()
        return dict(self._kinds)

    @property
    def calls(self) -> int:
        """Number of collectives; waits for a GPU."""
        return sum(kind.durations.count for kind in self.by_kind.values())

    @property
    def sent_bytes(self) -> int:
        """Bytes that left this rank for another one."""
        return sum(kind.sent_bytes for kind in self._kinds.values())

    def seconds(self) -> float:
        """Seconds in collectives, waiting for slower ranks included; waits for a GPU."""
        return sum(kind.durations.total_s for kind in self.by_kind.values())

    def so_far(self) -> tuple[int, float]:
        """Returns how many collectives have ended, and their seconds; waits for nothing.

        Another thread may ask: of a GPU those are counted whose clocks this rank has read.
        """
        durations = [kind.durations for kind in tuple(self._kinds.values())]
        return sum(each.count for each in durations), sum(each.total_s for each in durations)

    def reset(self) -> None:
        """Forgets what was counted so far."""
        self._kinds.clear()
        self._unfinished.clear()

    @contextmanager
    def timed(self, kind: str, device: torch.device, sent_bytes: int) -> Iterator[None]:
        """Times one collective: by the clock on a CPU, by events without a sync on a GPU.

        In a compiled pass nothing is counted: it would be compiled anew for each new count. Neither
        is in a pass that a CUDA graph captures: to ask an event, even an earlier one, whether the
        device has come to it would end the capture, and replays do not come here.

        Args:
            kind: ``counts``, ``exchange``, ``gather``, ``reduce`` or ``sum``.
            device: Where its tensors live.
            sent_bytes: Bytes that leave this rank for another one.
        """
        if torch.compiler.is_compiling() or _is_capturing(device):
            yield
            return
        collective = _Collective(kind, since=now(device))
        self._current = collective
        yield
        self._end_span(collective, device)
        self._current = None
        self._kinds[kind].sent_bytes += sent_bytes
        self._unfinished.append(collective)
        self._read_clocks()

    @contextmanager
    def untimed(self, device: torch.device) -> Iterator[None]:
        """Leaves other work out of the time of the collective that it is done in."""
        collective = self._current
        if collective is None:
            yield
            return
        self._end_span(collective, device)
        yield
        collective.since = now(device)

    @staticmethod
    def _end_span(collective: _Collective, device: torch.device) -> None:
        collective.spans.append((collective.since, now(device)))

    def _read_clocks(self) -> None:
        """Counts the times of those that have ended."""
        while self._unfinished and has_passed(self._unfinished[0].spans[-1][1]):
            collective = self._unfinished.popleft()
            seconds = sum(seconds_between(begin, end) for begin, end in collective.spans)
            self._kinds[collective.kind].durations.add(seconds)


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
