"""Durations counted in buckets, so that those of a job of any length fit in a few hundred bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

__all__ = ["Durations"]

# Buckets grow by 2 ** (1 / 8), so a quantile is at most 9% too long.
_BUCKETS_A_DOUBLING = 8
_LEAST_S = 1e-9


@dataclass
class Durations:
    """How often things took how long, in seconds."""

    count: int = 0
    total_s: float = 0.0
    max_s: float = 0.0
    _buckets: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        """Counts one more."""
        self.count += 1
        self.total_s += seconds
        self.max_s = max(self.max_s, seconds)
        self._buckets[math.ceil(math.log2(max(seconds, _LEAST_S)) * _BUCKETS_A_DOUBLING)] += 1

    def quantile(self, share: float) -> float:
        """Returns what `share` of them took at most, in seconds, up to 9% too much; 0 of none."""
        wanted, seen = share * self.count, 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= wanted:
                return min(_upper_edge(bucket), self.max_s)
        return 0.0

    def histogram(self) -> list[tuple[float, int]]:
        """Returns the buckets that are not empty: the upper edge in seconds, and how many."""
        return [(_upper_edge(bucket), self._buckets[bucket]) for bucket in sorted(self._buckets)]

    def quantiles(self) -> dict[str, float] | None:
        """Returns p50, p95 and max in seconds, by name; None of none."""
        if not self.count:
            return None
        return {"p50": self.quantile(0.5), "p95": self.quantile(0.95), "max": self.max_s}

    @classmethod
    def merged(cls, parts: Iterable[Durations]) -> Durations:
        """Returns all of them together."""
        whole = cls()
        for part in parts:
            whole.count += part.count
            whole.total_s += part.total_s
            whole.max_s = max(whole.max_s, part.max_s)
            whole._buckets.update(part._buckets)
        return whole


def _upper_edge(bucket: int) -> float:
    return 2.0 ** (bucket / _BUCKETS_A_DOUBLING)
