"""`bench scale`: one MoE layer on more and more ranks, and the bytes that it sends, counted."""

# Shapes: N tokens of all ranks, T tokens of this one, H hidden, K top_k

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_moe_ep.bench.layer_sides import (
    OurLayer,
    add_shape_argument,
    build_one_layer,
    check_equal,
    time_sides,
    transformers_block,
)
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.routing import routed_tokens
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import Job

__all__ = ["TABLE", "least_bytes"]

_MS = 1000.0
_KB = 1000.0
_BAR = 1.1
# Every row travels only where it is wanted if the tokens of the ranks are not announced: small
# announced batches are sent to all, which costs bytes and saves a message.
_AUTO, _ROUTED = "auto", "routed rows only"
_SHARED_CORES = " The ranks share the cores of the machine."


def least_bytes(
    topk_ids_NK: Tensor, tokens_of_rank: Sequence[int], num_local_experts: int, row_bytes: int
) -> int:
    """Returns the bytes that all ranks together must send: each row once to a rank, and back.

    Args:
        topk_ids_NK: Expert ids of all tokens, those of rank 0 first.
        tokens_of_rank: Tokens of each rank; they sum to N.
        num_local_experts: Experts on each rank.
        row_bytes: Bytes of a row.
    """
    home_N = torch.repeat_interleave(torch.tensor(tokens_of_rank))
    owner_NK = topk_ids_NK.cpu() // num_local_experts
    pairs = {
        (token, owner)
        for token, owners in enumerate(owner_NK.tolist())
        for owner in owners
        if owner != home_N[token]
    }
    return 2 * row_bytes * len(pairs)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    add_shape_argument(parser)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[16, 256], metavar="T", help="tokens a rank"
    )
    parser.add_argument(
        "--total-tokens",
        type=int,
        nargs="+",
        default=[512],
        metavar="N",
        help="tokens of all ranks",
    )


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model = build_one_layer(SHAPES[args.shape])
    reference = transformers_block(model)
    announced: list[int] = []
    sides = {
        _AUTO: OurLayer(model, job, "auto", lambda: announced),
        _ROUTED: OurLayer(model, job, "alltoall", lambda: None),
    }
    works = [("per rank", tokens * job.info.world_size) for tokens in args.tokens]
    works += [("in all", tokens) for tokens in args.total_tokens]
    is_one_machine = len(set(job.nodes)) == 1 or args.simulate_hosts
    ranks_share_cores = is_one_machine and job.device.type != "cuda"
    results = []
    for fixed, total in works:
        shape = SHAPES[args.shape]
        logits_NE, x_NH = routed_tokens(model, "uniform", total, seed=total)
        parts = x_NH.tensor_split(job.info.world_size)
        announced[:] = map(len, parts)
        x_TH, expected_TH = parts[job.info.rank], reference(parts[job.info.rank])
        sent = {n: _sent_bytes(job, n, side, x_TH, expected_TH) for n, side in sides.items()}
        least = least_bytes(
            logits_NE.topk(shape.top_k).indices,
            announced,
            shape.num_experts // job.info.world_size,
            shape.hidden_size * x_TH.element_size(),
        )
        seconds = time_sides(job, sides, x_TH, rounds=args.rounds, timeout_s=args.timeout)
        results.append(
            {
                "fixed": fixed,
                "world_size": job.info.world_size,
                "num_nodes": len(set(job.nodes)),
                "ranks_share_cores": ranks_share_cores,
                "shape": args.shape,
                "total_tokens": total,
                "least_bytes": least / job.info.world_size,
                "sent_bytes": sent,
                "seconds": {name: vars(spread) for name, spread in seconds.items()},
            }
        )
    return results


def _sent_bytes(job: Job, name: str, side: OurLayer, x_TH: Tensor, expected_TH: Tensor) -> float:
    """Returns the bytes that a rank sends in one call, the mean over ranks."""
    before = side.stats.sent_bytes
    check_equal(job, name, side(x_TH.to(job.device)), expected_TH)
    return sum(job.all_gather(side.stats.sent_bytes - before)) / job.info.world_size


def _to_markdown(results: Sequence[Result]) -> str:
    names = (_AUTO, _ROUTED)
    titles = ["fixed", "ranks", "tokens in all", *(f"{name}, ms" for name in names)]
    titles += ["minimum, KB a rank", *(f"{name}, KB a rank" for name in names)]
    titles += [f"{_AUTO} / minimum", f"{_ROUTED} / minimum (bar {_BAR})"]
    rows = []
    for result in sorted(results, key=lambda r: (r["fixed"], r["total_tokens"] // _unit(r))):
        sent, least = result["sent_bytes"], result["least_bytes"]
        row = [f"tokens {result['fixed']}", result["world_size"], f"{result['total_tokens']:,}"]
        row += [with_range(result["seconds"][name], scale=_MS, digits=1) for name in names]
        row += [f"{num_bytes / _KB:,.1f}" for num_bytes in (least, *(sent[n] for n in names))]
        row += [f"{sent[name] / least:.2f}" if least else "-" for name in names]
        rows.append(row)
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"One MoE layer with its router: {SHAPES[results[0]['shape']].describe_layer()}, float32, "
        "uniform routing; all outputs are those of transformers' block (checked before each row). "
        "Milliseconds are the median (least to most) of "
        f"{results[0]['seconds'][_AUTO]['num_rounds']} rounds, the slowest rank's."
        f"{_SHARED_CORES if all(r['ranks_share_cores'] for r in results) else ''}\n\n"
        "KB are those of one call of the layer, the mean over ranks, of all that its collectives "
        "handed to other ranks: rows, expert ids and routing weights (8 bytes a slot), numbers of "
        "rows; in two levels, both. What stays on a rank is not counted. The minimum counts rows "
        "alone, each once to every other rank that owns one of its experts, and back: what this "
        f"run's routing needs. {_ROUTED}: alltoall without announced numbers of tokens; "
        f"{_AUTO} is told them, as by infer.py, and may send small batches to all ranks in fewer "
        "messages."
    )


def _unit(result: Result) -> int:
    """Returns what the total grows with where a row's work is fixed per rank."""
    return int(result["world_size"]) if result["fixed"] == "per rank" else 1


TABLE = Table(
    name="scale",
    heading="One MoE layer on more ranks",
    add_arguments=_add_arguments,
    measure=_measure,
    to_markdown=_to_markdown,
)
