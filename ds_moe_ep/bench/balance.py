"""`bench balance`: one MoE layer under skew, with contiguous and with placed experts."""

# Shapes: N tokens of all ranks, T tokens of this one, H hidden, E experts

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from ds_moe_ep.balance import RankLayout, balance, balancedness
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
from ds_moe_ep.bench.routing import ROUTINGS, tokens_with_logits
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.placement import SlotPlacement

__all__ = ["TABLE"]

_BEFORE = "contiguous"
_MS = 1000.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    add_shape_argument(parser)
    parser.add_argument("--tokens", type=int, default=512, metavar="T", help="tokens a rank")
    parser.add_argument(
        "--routing",
        nargs="+",
        choices=ROUTINGS,
        default=["trained", "zipf"],
        metavar="R",
        help=f"how tokens choose experts: {', '.join(ROUTINGS)}",
    )
    parser.add_argument(
        "--spare", type=int, nargs="+", default=[0, 2], metavar="N", help="spare slots a rank"
    )


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model = build_one_layer(SHAPES[args.shape])
    return [_measure_routing(args, job, model, routing) for routing in args.routing]


def _measure_routing(
    args: argparse.Namespace, job: Job, model: Qwen3MoeForCausalLM, routing: str
) -> Result:
    """Places experts by the first half of the tokens, and measures with the other."""
    loads_E, x_TH = _loads_and_tokens(args, job, model, routing)
    world_size, num_experts = job.info.world_size, len(loads_E)
    placements: dict[str, SlotPlacement | None] = {_BEFORE: None}
    for spare in args.spare:
        layout = RankLayout(world_size, num_experts // world_size + spare)
        slots = "1 spare slot" if spare == 1 else f"{spare} spare slots"
        name = f"placed, {slots} a rank" if spare else "placed, no copies"
        placements[name] = balance({0: loads_E.tolist()}, layout)
    announced = [args.tokens] * world_size
    sides = {
        name: OurLayer(model, job, "auto", lambda: announced, placement)
        for name, placement in placements.items()
    }
    expected_TH = transformers_block(model)(x_TH)
    balance_of = {}
    for name, side in sides.items():
        check_equal(job, name, side(x_TH.to(job.device)), expected_TH)
        balance_of[name] = balancedness(job.all_gather(side.num_rows_computed()))
    seconds = time_sides(job, sides, x_TH, rounds=args.rounds, timeout_s=args.timeout)
    return {
        "world_size": world_size,
        "shape": args.shape,
        "routing": routing,
        "tokens_per_rank": args.tokens,
        "balancedness": balance_of,
        "seconds": {name: vars(spread) for name, spread in seconds.items()},
    }


def _loads_and_tokens(
    args: argparse.Namespace, job: Job, model: Qwen3MoeForCausalLM, routing: str
) -> tuple[Tensor, Tensor]:
    """Returns what some tokens choose, rows of each expert ``[E]``, and others of this rank."""
    sizes, num_all = model.config, args.tokens * job.info.world_size
    generator = torch.Generator().manual_seed(args.tokens)
    num_experts, top_k = sizes.num_experts, sizes.num_experts_per_tok
    logits_NE = ROUTINGS[routing](2 * num_all, num_experts, top_k, generator)
    recorded_NE, measured_NE = logits_NE.split(num_all)
    chosen = recorded_NE.topk(top_k).indices.flatten()
    router_EH = model.model.layers[0].mlp.gate.weight
    x_NH = tokens_with_logits(measured_NE, router_EH, generator)
    return torch.bincount(chosen, minlength=num_experts), x_NH.split(args.tokens)[job.info.rank]


def _to_markdown(results: Sequence[Result]) -> str:
    names = list(results[0]["seconds"])
    titles = ["ranks", "routing", "experts", "balancedness", "ms", "tokens/s", "against before"]
    rows = []
    for result in results:
        tokens = result["world_size"] * result["tokens_per_rank"]
        before_s = result["seconds"][_BEFORE]["median"]
        for name in names:
            seconds = result["seconds"][name]
            rows.append(
                [
                    result["world_size"],
                    result["routing"],
                    name,
                    f"{result['balancedness'][name]:.3f}",
                    with_range(seconds, scale=_MS, digits=1),
                    f"{tokens / seconds['median']:,.0f}",
                    f"{before_s / seconds['median']:.2f}",
                ]
            )
    first = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"One MoE layer with its router: {SHAPES[first['shape']].describe_layer()}, float32, "
        f"{first['tokens_per_rank']} tokens a rank, dispatcher auto. Experts are placed by what as "
        "many other tokens chose (the text before, the same distribution), so balancedness, the "
        "mean over the most rows that any rank computed, is of tokens the placement has not seen. "
        "trained: what a layer of the bundled model says to its book. zipf: expert i in proportion "
        "to (i + 1) ** -1.2, so that the hottest are neighbours, which is the worst order for "
        "contiguous experts. All outputs equal transformers' block (checked before each row). "
        f"Milliseconds are the median (least to most) of {first['seconds'][_BEFORE]['num_rounds']} "
        "rounds, the slowest rank's. Where ranks share cores, a rank that waits leaves its core to "
        "the busy ones, so tokens/s gain less there than on ranks with cores of their own."
    )


TABLE = Table(
    name="balance",
    heading="Placement under skew",
    add_arguments=_add_arguments,
    measure=_measure,
    to_markdown=_to_markdown,
)
