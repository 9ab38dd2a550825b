"""Why a job misses a target, as far as its figures show, and what helps.

Whether a target is missed is decided in verdicts.py; what the figures show is found in findings.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ds_moe_ep.balance import RankLayout, balance, balancedness, contiguous_slots, rank_loads
from ds_moe_ep.monitor.findings import (
    Balance,
    KindLatency,
    hot_experts,
    mean_batch_size,
    pass_parts,
    rows_per_pass,
)
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.metrics_format import RankMetrics
from ds_moe_ep.monitor.units import few_digits, size, time_of, times

__all__ = [
    "small_batch",
    "where_time_goes",
    "why_more_memory",
    "why_slow_collective",
    "why_unbalanced",
]

# From where on an expert counts as hot, rows as few, a batch as small.
_HOT, _FEW_ROWS, _SMALL_BATCH = 1.5, 64, 8
# What is more than the mean by less than this is no reason.
_MORE = 1.05
# Chance evens out: where the whole run is more balanced than its passes by this, it is a reason.
# And a placement that makes a layer more balanced by less is not worth a word.
_NOTABLY = 0.03


def small_batch(metrics: Metrics) -> list[str]:
    """Says that batches are small, if they are."""
    batch = mean_batch_size(metrics)
    if batch is None or batch >= _SMALL_BATCH:
        return []
    return [f"batches are small ({batch:.3g} prompts a rank)"]


def why_more_memory(metrics: Metrics, most: RankMetrics) -> str:
    """Says whether the rank with most memory has most work."""

    def factor(name: str, of: int, values: Sequence[int]) -> tuple[float, str]:
        return (of * len(values) / sum(values) if any(values) else 1.0), name

    rows = factor("expert rows", most.expert_rows, [rank.expert_rows for rank in metrics.ranks])
    tokens = factor(
        "tokens of prompts",
        most.prompt_tokens + most.new_tokens,
        [rank.prompt_tokens + rank.new_tokens for rank in metrics.ranks],
    )
    share, name = max(rows, tokens)
    if share > _MORE:
        return f"rank {most.rank} has {times(share)} the mean of {name}"
    return f"rank {most.rank} has no more rows or tokens than the mean: it is not the work"


def why_slow_collective(worst: KindLatency, target_s: float) -> str:
    """Says whether a kind of collective is slow by itself, or waits for a rank."""
    if worst.least_p50_s < target_s:
        return (
            f"waiting, not links: rank {worst.least_rank}, which the others wait for, takes "
            f"{time_of(worst.least_p50_s)}"
        )
    return (
        f"slow links: even rank {worst.least_rank}, which waits least, takes "
        f"{time_of(worst.least_p50_s)} for {size(worst.sent_bytes / worst.count)}"
    )


def why_unbalanced(metrics: Metrics, found: Balance) -> list[str]:
    """Says whether it is the router or chance, and which placement would help."""
    reasons = []
    hottest = next(iter(hot_experts(metrics)), None)
    if hottest is not None and hottest.factor >= _HOT:
        reasons.append(f"skewed router: {hottest}")
    rows = rows_per_pass(metrics)
    if rows < _FEW_ROWS and found.of_whole_run > found.average + _NOTABLY:
        reasons.append(
            f"chance: {few_digits(rows)} rows a rank, layer and pass are few; over the whole run "
            f"ranks are at {found.of_whole_run:.2f}"
        )
    if not reasons:
        busiest = max(metrics.ranks, key=lambda rank: rank.expert_rows)
        factor = 1 / found.of_whole_run
        reasons.append(f"rank {busiest.rank} computes {times(factor)} the mean of rows")
    return reasons + _better_placement(metrics, found.worst_layer)


def _better_placement(metrics: Metrics, layer: int) -> list[str]:
    """Names the command that would place experts better, if one would in the layer that needs it.

    With one expert on each rank only copies of the hottest help, in a second slot of each rank.
    """
    run, loads = metrics.run, metrics.expert_loads[layer]
    ep_size = run.plan.ep_size
    if ep_size == 1:
        return []
    command = f"ds-moe-ep balance {shlex.quote(str(metrics.folder))}"
    if ep_size != run.world_size:
        command += f" --ep-size {ep_size}"
    if run.slots_per_rank is not None:
        command += f" --slots-per-rank {run.slots_per_rank}"
        return [f"experts were placed by the loads of another run; by these: {command}"]
    num_local = run.num_experts // ep_size
    if num_local == 1:
        command += " --slots-per-rank 2"
    placed = balance({layer: loads}, RankLayout(ep_size, max(2, num_local)))
    before, after = (
        balancedness(rank_loads(loads, slots, ep_size))
        for slots in (contiguous_slots(run.num_experts, ep_size), placed.expert_of_slot[layer])
    )
    if after < before + _NOTABLY:
        return []
    return [
        f"another placement would bring layer {layer} from {before:.2f} to {after:.2f} over the "
        f"whole run: {command}"
    ]


def where_time_goes(metrics: Metrics, kind: str) -> list[str]:
    """Says what a pass spends most on."""
    reasons = ["CPU run"] if metrics.run.on_cpu else []
    if parts := pass_parts(metrics, kind):
        whole = sum(parts.values())
        sent = "dispatch and combine, waiting included,"
        shares = {part: parts[part] / whole for part in ("attention", "router", "experts", "other")}
        shares[sent] = (parts["dispatch"] + parts["combine"]) / whole
        most, second = sorted(shares, key=lambda part: -shares[part])[:2]
        verb = "take" if most in (sent, "experts") else "takes"
        reasons.append(
            f"{most} {verb} {shares[most]:.0%} of a pass, {second.rstrip(',')} {shares[second]:.0%}"
        )
    return reasons
