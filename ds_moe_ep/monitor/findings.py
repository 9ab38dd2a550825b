"""What the figures of a job show beyond themselves: which rank is slow, which expert hot, and why.

Whether that is good enough is decided in verdicts.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean

from ds_moe_ep.balance import balancedness
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.metrics_format import PARTS, PASS_KINDS, BalanceWindow, RankMetrics
from ds_moe_ep.monitor.units import span, times

__all__ = [
    "Balance",
    "HotExpert",
    "KindLatency",
    "SlowRank",
    "balance_of",
    "hot_experts",
    "kind_latencies",
    "mean_batch_size",
    "pass_parts",
    "replays_told",
    "rows_per_pass",
    "slow_rank",
]

# A rank that the others wait for during less of the run than this is not called slow, and a part
# or a number of rows less above the mean than this is not called the reason.
_LEAST_WAIT, _LEAST_EXCESS = 0.02, 0.05
_OWN_PARTS = ("attention", "router", "experts", "other")


@dataclass(frozen=True)
class HotExpert:
    """An expert that gets more tokens than the others of its layer.

    Attributes:
        layer: Its layer.
        expert: Its number.
        tokens: Its tokens.
        factor: Those by the mean of its layer's experts.
    """

    layer: int
    expert: int
    tokens: int
    factor: float

    def __str__(self) -> str:
        return f"expert {self.expert} of layer {self.layer} takes {times(self.factor)} the mean"


def hot_experts(metrics: Metrics) -> list[HotExpert]:
    """Returns the hottest expert of each layer that had tokens, the hottest of all first."""
    found = []
    for layer, loads in metrics.expert_loads.items():
        if sum(loads):
            tokens = max(loads)
            factor = tokens * len(loads) / sum(loads)
            found.append(HotExpert(layer, loads.index(tokens), tokens, factor))
    return sorted(found, key=lambda hot: (-hot.factor, hot.layer))


@dataclass(frozen=True)
class Balance:
    """Mean/max over ranks of the rows they computed; 1 is perfect.

    Attributes:
        average: Mean of all passes.
        worst_window: The passes where it was lowest.
        worst_layer: The layer where its mean is lowest.
        of_worst_layer: And that mean.
        of_whole_run: The same of the rows of the whole run, in which chance evens out.
    """

    average: float
    worst_window: BalanceWindow
    worst_layer: int
    of_worst_layer: float
    of_whole_run: float


def balance_of(metrics: Metrics) -> Balance | None:
    """Returns how balanced ranks were; None if it was not recorded, or of a single rank."""
    windows = metrics.windows
    if not windows or metrics.run.world_size == 1:
        return None
    num_passes = [window.last_step - window.first_step + 1 for window in windows]

    def average(values: Sequence[float]) -> float:
        return sum(map(float.__mul__, values, map(float, num_passes))) / sum(num_passes)

    by_layer = {
        layer: average([window.layers[index] for window in windows])
        for index, layer in enumerate(metrics.run.moe_layers)
    }
    worst = min(by_layer, key=by_layer.__getitem__)
    rows = [rank.expert_rows for rank in metrics.ranks]
    return Balance(
        average([window.overall for window in windows]),
        min(windows, key=lambda window: window.overall),
        worst,
        by_layer[worst],
        balancedness(rows),
    )


@dataclass(frozen=True)
class KindLatency:
    """How long the collectives of one kind took.

    Attributes:
        kind: ``exchange``, ``gather``, ``reduce``, ``sum`` or ``counts``.
        count: How many there were, on all ranks.
        sent_bytes: Bytes sent by all ranks.
        p50_s: Median, in seconds, on the rank where it is highest.
        p95_s: The same of p95.
        max_s: The longest.
        least_p50_s: Median on the rank where it is lowest: that one waits least for the others, so
            this is the most that the links take.
        least_rank: And that rank.
    """

    kind: str
    count: int
    sent_bytes: int
    p50_s: float
    p95_s: float
    max_s: float
    least_p50_s: float
    least_rank: int


def kind_latencies(metrics: Metrics) -> list[KindLatency]:
    """Returns what collectives took, slowest kind first, without kinds that did not take place."""
    found = []
    for kind in {kind for rank in metrics.ranks for kind in rank.collectives}:
        ranks = [
            (rank.rank, rank.collectives[kind])
            for rank in metrics.ranks
            if kind in rank.collectives and rank.collectives[kind].count
        ]
        if not ranks:
            continue
        least_rank, least = min(ranks, key=lambda item: item[1].p50_s)
        every = [collective for _, collective in ranks]
        found.append(
            KindLatency(
                kind,
                sum(each.count for each in every),
                sum(each.sent_bytes for each in every),
                max(each.p50_s for each in every),
                max(each.p95_s for each in every),
                max(each.max_s for each in every),
                least.p50_s,
                least_rank,
            )
        )
    return sorted(found, key=lambda latency: (-latency.p50_s, latency.kind))


def replays_told(metrics: Metrics) -> str:
    """Says how many passes replayed a CUDA graph, whose collectives have no times; empty if none.

    Every rank starts the same passes, so they are told of the rank that replayed most of them.
    """
    most = max(metrics.ranks, key=lambda rank: rank.num_replays)
    if not most.num_replays:
        return ""
    return (
        f"{most.num_replays:,} of {most.num_steps:,} passes were replayed: their collectives are "
        "not timed"
    )


@dataclass(frozen=True)
class SlowRank:
    """A rank that the others wait for.

    Attributes:
        rank: Its number.
        host: Its host.
        wait_s: Seconds that the others wait for it, on the mean.
        wait_share: Those by the time of the run.
        why: What it spends more on than the others, as far as the figures show.
    """

    rank: int
    host: str
    wait_s: float
    wait_share: float
    why: str

    def __str__(self) -> str:
        return (
            f"rank {self.rank} ({self.host}): the others wait {span(self.wait_s)} for it, "
            f"{self.wait_share:.0%} of the run; {self.why}"
        )


def slow_rank(metrics: Metrics) -> SlowRank | None:
    """Returns the rank that waits least, if the others wait notably longer: they wait for it."""
    slow = min(metrics.ranks, key=lambda rank: rank.comm_s)
    others = [rank for rank in metrics.ranks if rank is not slow]
    run_s = max(rank.run_s for rank in metrics.ranks)
    if not others or not run_s:
        return None
    wait_s = mean(rank.comm_s for rank in others) - slow.comm_s
    if wait_s < _LEAST_WAIT * run_s:
        return None
    return SlowRank(slow.rank, slow.host, wait_s, wait_s / run_s, _why_slow(slow, others))


def _why_slow(slow: RankMetrics, others: Sequence[RankMetrics]) -> str:
    more_s = {
        part: _seconds(slow, part) - mean(_seconds(rank, part) for rank in others)
        for part in _OWN_PARTS
    }
    part = max(more_s, key=more_s.__getitem__)
    usual_s = mean(_seconds(rank, part) for rank in others)
    if more_s[part] <= _LEAST_EXCESS * usual_s:
        return "no part of its passes takes longer than the others', so it starts them later"
    more_of = {
        "expert rows": _factor(slow, others, lambda rank: rank.expert_rows),
        "tokens of its own": _factor(
            slow, others, lambda rank: rank.prompt_tokens + rank.new_tokens
        ),
    }
    cause = "expert rows" if part == "experts" else "tokens of its own"
    named = {"experts": "its experts take", "other": "what is in no other part takes"}
    told = f"{named.get(part, f'its {part} takes')} {span(more_s[part])} longer"
    if more_of[cause] > 1 + _LEAST_EXCESS:
        return f"{told}, with {times(more_of[cause])} the others' {cause}"
    return f"{told}, with no more {cause} than the others: its device is slower, or shared"


def _seconds(rank: RankMetrics, part: str) -> float:
    return sum(getattr(getattr(rank.parts_s, kind), part) for kind in PASS_KINDS)


def _factor(
    slow: RankMetrics, others: Sequence[RankMetrics], what: Callable[[RankMetrics], int]
) -> float:
    usual = mean(what(rank) for rank in others)
    return what(slow) / usual if usual else 1.0


def pass_parts(metrics: Metrics, kind: str) -> dict[str, float]:
    """Returns seconds of a pass by part, the mean of all passes of the ranks that split some.

    Empty if no pass was split into parts. A rank with one decode pass splits none.
    """
    num_passes, seconds = 0, dict.fromkeys(PARTS, 0.0)
    for rank in metrics.ranks:
        of_rank = getattr(rank.parts_s, kind).model_dump()
        if any(of_rank.values()):
            num_passes += getattr(rank.num_passes, kind)
            seconds = {part: seconds[part] + of_rank[part] for part in PARTS}
    if not num_passes:
        return {}
    return {part: each / num_passes for part, each in seconds.items()}


def rows_per_pass(metrics: Metrics) -> float:
    """Returns rows that a rank computes in a layer in a pass, on the mean; without padding."""
    rows = sum(rank.expert_rows for rank in metrics.ranks)
    num_steps = max(rank.num_steps for rank in metrics.ranks)
    each = len(metrics.expert_loads) * metrics.run.world_size * num_steps
    return rows / each if each else 0.0


def mean_batch_size(metrics: Metrics) -> float | None:
    """Returns prompts in a rank's batch, on the mean of the moments at which it had one."""
    sizes = [sample.batch_size for sample in metrics.samples if sample.batch_size]
    return mean(sizes) if sizes else None
