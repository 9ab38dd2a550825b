"""What a run did and cost: measured per rank, gathered on rank 0, shown as a block of text.

Judging the figures against targets is a matter of the monitor, not of this module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.balance import balancedness

__all__ = ["RankSummary", "format_summary"]


@dataclass(frozen=True)
class RankSummary:
    """The figures of one rank.

    Attributes:
        rank: Global rank.
        host: Its host.
        dispatcher: How its tokens reached their experts; of ``auto`` what it chose, and why.
        num_prompts: Prompts this rank served.
        prompt_tokens: Their tokens.
        new_tokens: Tokens it generated.
        expert_rows: Rows its experts computed; none are of padding.
        load_s: Seconds from start of loading to a usable model.
        run_s: Seconds from the first batch until all ranks were done.
        comm_s: Seconds of those in collectives, waiting for slower ranks included.
        comm_bytes: Bytes of rows sent to other ranks.
        num_steps: Forward passes this rank took part in.
        num_replays: Those of them that replayed a CUDA graph, whose collectives nobody times.
        peak_memory_bytes: Of a GPU the most that torch's allocator gave out; on a CPU the most that
            the process held, of pages that others have too its share as it was at the end.
    """

    rank: int
    host: str
    dispatcher: str
    num_prompts: int
    prompt_tokens: int
    new_tokens: int
    expert_rows: int
    load_s: float
    run_s: float
    comm_s: float
    comm_bytes: int
    num_steps: int
    num_replays: int
    peak_memory_bytes: int


def format_summary(ranks: Sequence[RankSummary], *, task: str, output: Path) -> str:
    """Returns the closing summary of a run, one figure a line."""
    run_s = max(rank.run_s for rank in ranks)
    prompts = sum(rank.num_prompts for rank in ranks)
    prompt_tokens = sum(rank.prompt_tokens for rank in ranks)
    new_tokens = sum(rank.new_tokens for rank in ranks)
    tokens, what = (new_tokens, "generated") if task == "generate" else (prompt_tokens, "scored")
    speed = tokens / run_s if run_s else 0.0
    comm = _span([rank.comm_s for rank in ranks], "s")
    comm_share = max(rank.comm_s for rank in ranks) / run_s if run_s else 0.0
    sent_mib = sum(rank.comm_bytes for rank in ranks) / 2**20
    memory = _span([rank.peak_memory_bytes / 2**30 for rank in ranks], "GiB")
    steps = f"{ranks[0].num_steps} steps"
    if ranks[0].num_replays:
        steps += f", {ranks[0].num_replays} of them replays"
    lines = {
        "prompts": f"{prompts} on {len(ranks)} ranks, {prompt_tokens:,} prompt tokens",
        "tokens": f"{tokens:,} {what}",
        "speed": f"{speed:,.1f} tokens/s over {run_s:.2f} s, {steps}",
        "load": f"{max(rank.load_s for rank in ranks):.2f} s (slowest rank)",
        "communication": f"{comm} a rank, waiting included ({comm_share:.0%} of the run at most), "
        f"{sent_mib:.1f} MiB sent",
        "dispatcher": ranks[0].dispatcher,
        "load balance": f"{_balance(ranks)} (expert rows a rank, mean/max; 1 is perfect)",
        "peak memory": f"{memory} a rank",
        "output": str(output),
    }
    return "\n".join(f"{name:>14}  {value}" for name, value in lines.items())


def _balance(ranks: Sequence[RankSummary]) -> str:
    rows = [rank.expert_rows for rank in ranks]
    return f"{balancedness(rows):.3f}" if any(rows) else "no rows"


def _span(values: Sequence[float], unit: str) -> str:
    low, high = min(values), max(values)
    return (
        f"{high:.2f} {unit}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f} {unit}"
    )
