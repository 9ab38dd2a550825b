"""Times sides against each other: in turn, in one job, so that both meet the same machine."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Spread", "time_in_turn"]


@dataclass(frozen=True)
class Spread:
    """What several measurements of one thing gave, in its unit."""

    median: float
    min: float
    max: float
    num_rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of some values, of which there must be one at least."""
        return cls(statistics.median(values), min(values), max(values), len(values))


def time_in_turn(
    sides: Mapping[str, Callable[[], object]],
    num_rounds: int,
    *,
    wait_for_all: Callable[[], None] = lambda: None,
    slowest: Callable[[float], float] = lambda seconds: seconds,
) -> dict[str, Spread]:
    """Times every side once a round, in an order of its own each round.

    The orders are random, so that no side always follows the same one and finds the caches as that
    leaves them; they are the same on all ranks, and in every run. What a side returns lives until
    its time has been taken, and no longer.

    Args:
        sides: What to time, by name; on every rank the same names in the same order.
        num_rounds: How often.
        wait_for_all: Brings the ranks together before a side starts.
        slowest: Turns this rank's seconds into those of the slowest rank.

    Returns:
        Seconds of each side.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    chance = random.Random(0)
    for _ in range(num_rounds):
        for name in chance.sample(list(sides), len(sides)):
            wait_for_all()
            start = time.perf_counter()
            made = sides[name]()
            taken = time.perf_counter() - start
            del made
            seconds[name].append(slowest(taken))
    return {name: Spread.of(values) for name, values in seconds.items()}
