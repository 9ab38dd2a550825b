"""Judges a job by the targets of the deployment: measured, target, met or not, and why not.

Likely reasons are found in reasons.py. Nothing is judged that a run cannot show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Literal

from ds_moe_ep.monitor.findings import (
    balance_of,
    kind_latencies,
    mean_batch_size,
    replays_told,
    slow_rank,
)
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.reasons import (
    small_batch,
    where_time_goes,
    why_more_memory,
    why_slow_collective,
    why_unbalanced,
)
from ds_moe_ep.monitor.units import few_digits, size, time_of

__all__ = ["COLLECTIVE_NAMES", "PERFECT_BALANCE", "TARGETS", "Targets", "Verdict", "judge"]

COLLECTIVE_NAMES = {
    "exchange": "all-to-all",
    "gather": "all-gather",
    "reduce": "reduce-scatter",
    "sum": "all-reduce",
    "counts": "counts",
}
"""What a kind of collective is called; counts are the small messages that announce rows."""

State = Literal["met", "missed", "open"]

PERFECT_BALANCE = 0.995
"""Balancedness that is 1.00 when it is rounded is perfect."""


@dataclass(frozen=True)
class Targets:
    """What the deployment is to reach.

    Attributes:
        utilisation: Of the GPUs, at least.
        memory_variance: (max - min) / mean over ranks, less than.
        collective_s: Seconds of a collective (p50), less than.
        decode_s: Seconds of a decode pass (p50), at most.
        sequences_per_s: At least, on `num_gpus`.
        num_gpus: What that is for.
        memory_efficiency: Used by available memory, at least.
    """

    utilisation: float = 0.95
    memory_variance: float = 0.05
    collective_s: float = 1e-3
    decode_s: float = 8e-3
    sequences_per_s: float = 120_000
    num_gpus: int = 64
    memory_efficiency: float = 0.88


TARGETS = Targets()


@dataclass(frozen=True)
class Verdict:
    """One quantity, judged.

    Attributes:
        name: What it is.
        measured: As people read it; empty if it was not measured.
        target: As people read it.
        state: ``met``, ``missed``, or ``open``: not measured, or not for this run to show.
        reason: Why it is so, in words, from the figures of the run.
        value: What was measured, as a number; a share, seconds or prompts a second.
    """

    name: str
    measured: str
    target: str
    state: State
    reason: str
    value: float | None = None


def judge(metrics: Metrics) -> list[Verdict]:
    """Returns a verdict on each of the monitored quantities, then on each of performance."""
    return [
        _utilisation(metrics),
        _memory_variance(metrics),
        _collective_latency(metrics),
        _balancedness(metrics),
        _decode_latency(metrics),
        _sequences(metrics),
        _memory_efficiency(metrics),
    ]


def _state(is_met: bool) -> State:
    return "met" if is_met else "missed"


def _utilisation(metrics: Metrics) -> Verdict:
    shares = [rank.utilisation for rank in metrics.ranks]
    value = mean(shares)
    is_met = value >= TARGETS.utilisation
    low, high = f"{min(shares):.0%}", f"{max(shares):.0%}"
    reasons = [f"from {low} to {high}"] if low != high else []
    if metrics.run.on_cpu:
        reasons.append("CPU run: CPU time of each process by wall time stands for GPU utilisation")
    if not is_met:
        run_s = max(rank.run_s for rank in metrics.ranks)
        share = mean(rank.comm_s for rank in metrics.ranks) / run_s if run_s else 0.0
        if metrics.run.world_size > 1 and not replays_told(metrics):
            reasons.append(f"collectives, with waiting, take {share:.0%} of the run")
        if slow := slow_rank(metrics):
            reasons.append(f"the others wait for rank {slow.rank}")
        if not metrics.run.on_cpu:  # a collective of NCCL is a kernel: while one waits it is busy
            reasons.append("a GPU is idle while its host prepares what it is to do")
        reasons += small_batch(metrics)
    target = f">= {TARGETS.utilisation:.0%}"
    return Verdict(
        "GPU utilisation", f"{value:.1%}", target, _state(is_met), _joined(reasons), value
    )


def _memory_variance(metrics: Metrics) -> Verdict:
    name, target = "memory variance", f"< {TARGETS.memory_variance:.0%}"
    if len(metrics.ranks) == 1:
        return Verdict(name, "", target, "open", "one rank has nothing to be compared with")
    most = max(metrics.ranks, key=lambda rank: rank.peak_memory_bytes)
    least = min(metrics.ranks, key=lambda rank: rank.peak_memory_bytes)
    usual = mean(rank.peak_memory_bytes for rank in metrics.ranks)
    value = (most.peak_memory_bytes - least.peak_memory_bytes) / usual if usual else 0.0
    is_met = value < TARGETS.memory_variance
    reason = (
        f"peaks from {size(least.peak_memory_bytes)} (rank {least.rank}) to "
        f"{size(most.peak_memory_bytes)} (rank {most.rank})"
    )
    if not is_met:
        reason += f"; {why_more_memory(metrics, most)}"
    return Verdict(name, f"{value:.1%}", target, _state(is_met), reason, value)


def _collective_latency(metrics: Metrics) -> Verdict:
    name, target = "collective latency", f"< {TARGETS.collective_s * 1e3:g} ms (p50)"
    latencies, replayed = kind_latencies(metrics), replays_told(metrics)
    if not latencies:
        return Verdict(name, "", target, "open", replayed or "no collective took place")
    worst = latencies[0]
    measured = time_of(worst.p50_s)
    is_met = worst.p50_s < TARGETS.collective_s
    reasons = [
        f"{COLLECTIVE_NAMES[worst.kind]} is slowest",
        f"p95 {time_of(max(latency.p95_s for latency in latencies))}, "
        f"max {time_of(max(latency.max_s for latency in latencies))}",
    ]
    if not is_met:
        reasons.append(why_slow_collective(worst, TARGETS.collective_s))
        if metrics.run.on_cpu:
            reasons.append("CPU run, without the links of GPUs")
    if replayed:
        reasons.append(replayed)
    return Verdict(name, measured, target, _state(is_met), _joined(reasons), worst.p50_s)


def _balancedness(metrics: Metrics) -> Verdict:
    name, target = "balancedness", "1.0 (mean/max)"
    balance = balance_of(metrics)
    if balance is None:
        reason = (
            "one rank has nothing to be balanced with"
            if metrics.run.world_size == 1
            else "no pass was recorded"
        )
        return Verdict(name, "", target, "open", reason)
    window = balance.worst_window
    reasons = [
        f"worst passes {window.overall:.2f} ({window.first_step} to {window.last_step}), "
        f"worst layer {balance.of_worst_layer:.2f} (layer {balance.worst_layer}), rows of the "
        f"whole run {balance.of_whole_run:.2f}"
    ]
    is_met = balance.average >= PERFECT_BALANCE
    if not is_met:
        reasons += why_unbalanced(metrics, balance)
    measured = f"{balance.average:.2f}"
    return Verdict(name, measured, target, _state(is_met), _joined(reasons), balance.average)


def _decode_latency(metrics: Metrics) -> Verdict:
    name, target = "latency of a decode pass", f"<= {TARGETS.decode_s * 1e3:g} ms (p50)"
    measured_ranks = [rank.pass_s.decode for rank in metrics.ranks if rank.pass_s.decode]
    if not measured_ranks:
        why = "prompts are scored" if metrics.run.task == "score" else "no pass was recorded"
        return Verdict(name, "", target, "open", f"no decode pass: {why}")
    value = max(quantiles.p50 for quantiles in measured_ranks)
    is_met = value <= TARGETS.decode_s
    reasons = [
        f"p95 {time_of(max(quantiles.p95 for quantiles in measured_ranks))}, "
        f"max {time_of(max(quantiles.max for quantiles in measured_ranks))}"
    ]
    if not is_met:
        reasons += where_time_goes(metrics, "decode")
    return Verdict(name, time_of(value), target, _state(is_met), _joined(reasons), value)


def _sequences(metrics: Metrics) -> Verdict:
    name = "sequences a second"
    target = f">= {TARGETS.sequences_per_s:,.0f} on {TARGETS.num_gpus} GPUs"
    run_s = max(rank.run_s for rank in metrics.ranks)
    prompts = sum(rank.num_prompts for rank in metrics.ranks)
    if not run_s or not prompts:
        return Verdict(name, "", target, "open", "no prompt was served")
    value = prompts / run_s
    tokens = sum(rank.prompt_tokens + rank.new_tokens for rank in metrics.ranks) / prompts
    told = f"{prompts:,} prompts of {few_digits(tokens)} tokens, new ones included"
    world_size = metrics.run.world_size
    if metrics.run.on_cpu or world_size != TARGETS.num_gpus:
        what = "CPU rank" if metrics.run.on_cpu else "GPU"
        plural = "" if world_size == 1 else "s"
        reason = f"{told}; {world_size} {what}{plural} cannot show what {TARGETS.num_gpus} GPUs do"
        return Verdict(name, few_digits(value), target, "open", reason, value)
    is_met = value >= TARGETS.sequences_per_s
    reasons = [told]
    if not is_met:
        kind = "decode" if metrics.run.task == "generate" else "prefill"
        reasons += [*where_time_goes(metrics, kind), *small_batch(metrics)]
    return Verdict(name, few_digits(value), target, _state(is_met), _joined(reasons), value)


def _memory_efficiency(metrics: Metrics) -> Verdict:
    name, target = "memory efficiency", f">= {TARGETS.memory_efficiency:.0%} of available"
    available = metrics.run.available_memory_bytes
    usual = mean(rank.peak_memory_bytes for rank in metrics.ranks)
    if available is None:
        why = (
            "CPU run: ranks share the memory of their host"
            if metrics.run.on_cpu
            else "what a rank could have had was not recorded"
        )
        return Verdict(name, "", target, "open", f"peak of {size(usual)} a rank; {why}")
    value = usual / available
    is_met = value >= TARGETS.memory_efficiency
    reasons = [f"peak of {size(usual)} a rank, which has {size(available)}"]
    if not is_met:
        batch = mean_batch_size(metrics)
        now = "" if batch is None else f" than {_few(batch)} prompts a rank"
        reasons.append(f"there is room for larger batches{now}, where there are prompts for them")
    return Verdict(name, f"{value:.1%}", target, _state(is_met), _joined(reasons), value)


def _few(prompts: float) -> str:
    return few_digits(prompts) if prompts >= 100 else f"{prompts:.3g}"


def _joined(reasons: Sequence[str]) -> str:
    return "; ".join(reasons)
