"""A job as it is now, from what it writes while it runs: its ranks, or its hosts.

How that is shown is decided in top.py.
"""

from __future__ import annotations

import shlex
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.metrics_folder import GrowingFile, read_run
from ds_moe_ep.monitor.metrics_format import (
    BALANCE_JSONL,
    RANKS_JSONL,
    RUN_JSON,
    SAMPLES_JSONL,
    BalanceWindow,
    Sample,
)
from ds_moe_ep.monitor.units import printable

__all__ = ["LiveRun", "Row", "follow"]

# Tokens a second are those of the last seconds: shorter jumps about, longer lags behind.
_RECENT_S = 10.0


@dataclass(frozen=True)
class Row:
    """A rank, a host or the whole job, now.

    Attributes:
        name: The rank's number and host, the host's name and number of ranks, or ``all``.
        utilisation: Mean of its ranks.
        memory_bytes: Of the rank that uses most.
        tokens_per_s: New tokens in the last seconds, of all its ranks.
        prompts_done: Of all its ranks.
        prompts_queued: Of all its ranks.
        batch_size: The largest of its ranks.
        step: The furthest of its ranks.
        collective_s: Mean of a collective in the last seconds, waiting included; 0 without any.
        at: Where the rank that is furthest behind is.
    """

    name: str
    utilisation: float
    memory_bytes: int
    tokens_per_s: float
    prompts_done: int
    prompts_queued: int
    batch_size: int
    step: int
    collective_s: float
    at: str


class LiveRun:
    """Follows a job.

    Args:
        folder: What was given to ``infer.py --metrics``.

    Attributes:
        run: What is run.
        balance: How even ranks were in the last passes; None before there are enough, and of a
            single rank.

    Raises:
        ConfigError: run.json is missing, damaged or of another version.
    """

    def __init__(self, folder: Path) -> None:
        self.run = read_run(folder)
        self._folder = folder
        self._samples = GrowingFile(folder / SAMPLES_JSONL, Sample, self.run)
        self._windows = GrowingFile(folder / BALANCE_JSONL, BalanceWindow, self.run)
        self.balance: BalanceWindow | None = None
        self._recent: dict[int, deque[Sample]] = {}
        self._heard_at = time.monotonic()

    def update(self) -> None:
        """Reads what is new.

        Raises:
            ConfigError: A line is damaged, or of another job.
        """
        if not (self._folder / SAMPLES_JSONL).is_file():
            return  # the first batch has not begun
        for sample in self._samples.new_lines():
            recent = self._recent.setdefault(sample.rank, deque())
            if recent and sample.t_s < recent[-1].t_s:
                recent.clear()  # a new job in the same folder
                self.balance = None
            recent.append(sample)
            while len(recent) > 2 and recent[1].t_s < sample.t_s - _RECENT_S:
                recent.popleft()
            self._heard_at = time.monotonic()
        if self.run.world_size > 1 and (self._folder / BALANCE_JSONL).is_file():
            self.balance = next(reversed(self._windows.new_lines()), self.balance)

    @property
    def seconds(self) -> float:
        """Seconds since the first batch began; 0 before that."""
        return max((recent[-1].t_s for recent in self._recent.values()), default=0.0)

    @property
    def silent_s(self) -> float:
        """Seconds since the last sample came, or since this began to follow."""
        return time.monotonic() - self._heard_at

    @property
    def is_over(self) -> bool:
        """Whether the job has written its closing figures; a new one in the folder removes them."""
        return (self._folder / RANKS_JSONL).is_file()

    def total(self) -> Row:
        """Returns the whole job."""
        return self._row("all", sorted(self._recent))

    def ranks(self) -> list[Row]:
        """Returns a row for each rank that has left a sample."""
        return [
            self._row(f"{rank:>4} {printable(self.run.hosts[rank])}", [rank])
            for rank in sorted(self._recent)
        ]

    def hosts(self) -> list[Row]:
        """Returns a row for each host with such a rank."""
        ranks_of: dict[str, list[int]] = {}
        for rank in sorted(self._recent):
            ranks_of.setdefault(self.run.hosts[rank], []).append(rank)
        return [
            self._row(f"{printable(host)} ({len(ranks)})", ranks)
            for host, ranks in ranks_of.items()
        ]

    def _row(self, name: str, ranks: Sequence[int]) -> Row:
        now = [self._recent[rank][-1] for rank in ranks]
        if not now:
            return Row(name, 0.0, 0, 0.0, 0, 0, 0, 0, 0.0, "")
        behind = max(now, key=lambda sample: (sample.prompts_queued, -sample.step))
        return Row(
            name,
            mean(sample.utilisation for sample in now),
            max(sample.memory_bytes for sample in now),
            sum(_tokens_per_s(self._recent[rank]) for rank in ranks),
            sum(sample.prompts_done for sample in now),
            sum(sample.prompts_queued for sample in now),
            max(sample.batch_size for sample in now),
            max(sample.step for sample in now),
            _collective_s([self._recent[rank] for rank in ranks]),
            printable(behind.at),
        )


def _tokens_per_s(recent: deque[Sample]) -> float:
    first, last = recent[0], recent[-1]
    elapsed_s = last.t_s - first.t_s
    return (last.new_tokens - first.new_tokens) / elapsed_s if elapsed_s else 0.0


def _collective_s(of_ranks: Sequence[deque[Sample]]) -> float:
    count = sum(recent[-1].collectives - recent[0].collectives for recent in of_ranks)
    seconds = sum(recent[-1].collectives_s - recent[0].collectives_s for recent in of_ranks)
    return seconds / count if count else 0.0


def follow(folder: Path) -> LiveRun:
    """Returns a job to follow.

    Raises:
        ConfigError: There is none; with how to start one.
    """
    if not (folder / RUN_JSON).is_file():
        raise ConfigError(
            f"{folder} has no {RUN_JSON}: no job has begun there. Start it first, in another "
            f"terminal: infer.py ... --metrics {shlex.quote(str(folder))}"
        )
    return LiveRun(folder)
