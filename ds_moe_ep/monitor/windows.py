"""Balance over time: how evenly ranks computed rows in windows of passes that all of them share.

A rank notes what it has computed so far at borders, every few passes; a window lies between two
borders that all ranks have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from pydantic import NonNegativeInt

from ds_moe_ep.balance import balancedness
from ds_moe_ep.config.strict import Strict
from ds_moe_ep.monitor.metrics_format import BalanceWindow

__all__ = ["Border", "Borders", "LiveBalance", "balance_windows"]

_FIRST_WINDOW_STEPS = 8
# Every second border is forgotten when there are more, so that a job of any length has enough.
_MOST_WINDOWS = 256
# Borders that others are told of: ranks are looked at up to a second apart, and one that is some
# borders ahead must still have told of those of the others.
_NUM_RECENT = 8


class Border(Strict):
    """What a rank has computed when a window ends.

    Attributes:
        step: Passes until then.
        rows: Rows that it has computed in each MoE layer, in all these passes.
    """

    step: NonNegativeInt
    rows: list[NonNegativeInt]


class Borders:
    """The borders of one rank. Every rank starts the same passes, so those of all have equal steps.

    Args:
        num_layers: MoE layers.
    """

    def __init__(self, num_layers: int) -> None:
        self.passed = [Border(step=0, rows=[0] * num_layers)]
        self._window_steps = _FIRST_WINDOW_STEPS

    def is_next(self, step: int) -> bool:
        """Tells whether there is one after `step` passes."""
        return step > 0 and step % self._window_steps == 0

    def add(self, step: int, rows: Sequence[int]) -> None:
        """Notes what has been computed after `step` passes; again after as many changes nothing."""
        if step == self.passed[-1].step:
            return
        # A new list, not a change: the sampler's thread reads it meanwhile.
        passed = [*self.passed, Border(step=step, rows=list(rows))]
        if len(passed) > _MOST_WINDOWS:
            passed = passed[::2]
            self._window_steps *= 2
        self.passed = passed

    def recent(self) -> list[Border]:
        """Returns the last few."""
        return self.passed[-_NUM_RECENT:]


def balance_windows(borders_of_rank: Sequence[Sequence[Border]]) -> list[BalanceWindow]:
    """Returns how even the ranks were between all their borders.

    Args:
        borders_of_rank: The borders of each rank, with equal steps.
    """
    return [_between(*pair) for pair in pairwise(zip(*borders_of_rank, strict=True))]


class LiveBalance:
    """How even ranks were in the last passes, from borders that they tell of while they run.

    Args:
        world_size: Ranks.
        num_layers: MoE layers.

    Attributes:
        window: From the last border but one that all were found to have, to the last; None until
            there is one.
    """

    def __init__(self, world_size: int, num_layers: int) -> None:
        self.window: BalanceWindow | None = None
        self._before = [Border(step=0, rows=[0] * num_layers)] * world_size

    def update(self, recent_of_rank: Sequence[Sequence[Border]]) -> None:
        """Takes the recent borders of each rank."""
        by_step = [{border.step: border for border in recent} for recent in recent_of_rank]
        step = max(set(by_step[0]).intersection(*by_step), default=0)
        if step > self._before[0].step:
            now = [borders[step] for borders in by_step]
            self.window = _between(self._before, now)
            self._before = now


def _between(before: Sequence[Border], after: Sequence[Border]) -> BalanceWindow:
    """Returns how even the ranks were from one border to another, of which each rank has one."""
    rows_RL = [
        [until - then for until, then in zip(late.rows, early.rows, strict=True)]
        for early, late in zip(before, after, strict=True)
    ]
    return BalanceWindow(
        first_step=before[0].step + 1,
        last_step=after[0].step,
        overall=balancedness([sum(rows_L) for rows_L in rows_RL]),
        layers=[balancedness(rows_R) for rows_R in zip(*rows_RL, strict=True)],
    )
