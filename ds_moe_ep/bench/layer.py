"""`bench layer`: one MoE layer, by tokens a rank and routing, against DeepSpeed's own layers."""

# Shapes: N tokens of all ranks, T tokens of this one, H hidden

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.bench.layer_sides import (
    LayerSide,
    autoep,
    build_one_layer,
    deepspeed_moe,
    ours,
    transformers_block,
)
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.routing import ROUTINGS, tokens_with_logits
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import time_in_turn
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.errors import DistributedError

__all__ = ["TABLE"]

_SHAPE = SHAPES["105M"]
_TOKENS = (1, 4, 16, 64, 256, 1024)
_OURS = ("auto", "alltoall", "allgather")
_PEERS = {"DeepSpeed MoE": deepspeed_moe, "DeepSpeed AutoEP": autoep}
_MS = 1000.0
# A call is repeated until a round has about this many tokens, so that short ones can be told apart.
_TOKENS_A_ROUND = 64
_MOST_CALLS = 8


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=_TOKENS, metavar="T", help="tokens a rank"
    )
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=list(ROUTINGS))
    parser.add_argument("--dispatchers", nargs="+", default=_OURS, metavar="D")


def _prepare(args: argparse.Namespace, work: Path) -> None:
    pass  # every rank builds the layer itself


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model = build_one_layer(_SHAPE)
    reference = transformers_block(model)
    announced = [0]
    sides: dict[str, LayerSide] = {
        name: ours(model, job, name, lambda: announced * job.info.world_size)
        for name in args.dispatchers
    }
    sides |= {name: build(model, job) for name, build in _PEERS.items()}
    results = []
    for routing in args.routing:
        for num_tokens in args.tokens:
            x_TH = _own_tokens(job, model, routing, num_tokens)
            announced[0] = num_tokens
            for name, side in sides.items():
                _check_equal(job, name, side(x_TH.to(job.device)), reference(x_TH))
            results.append(_time(args, job, sides, x_TH) | {"routing": routing})
    return results


def _own_tokens(job: Job, model: Any, routing: str, num_tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(num_tokens)
    num_all = num_tokens * job.info.world_size
    logits_NE = ROUTINGS[routing](num_all, _SHAPE.num_experts, _SHAPE.top_k, generator)
    router_EH = model.model.layers[0].mlp.gate.weight
    x_NH = tokens_with_logits(logits_NE, router_EH, generator)
    return x_NH.split(num_tokens)[job.info.rank]


def _check_equal(job: Job, name: str, actual_TH: Tensor, expected_TH: Tensor) -> None:
    """Refuses to time a side that computes something else."""
    error = (actual_TH.cpu() - expected_TH).abs().max().item()
    worst = max(job.all_gather(error))
    if not worst < 1e-4:
        raise DistributedError(f"{name} differs from transformers by {worst:g}: not timed.")


def _time(args: argparse.Namespace, job: Job, sides: dict[str, LayerSide], x_TH: Tensor) -> Result:
    num_tokens = len(x_TH)
    num_calls = max(1, min(_MOST_CALLS, _TOKENS_A_ROUND // num_tokens))
    x_TH = x_TH.to(job.device)

    def repeat(side: LayerSide) -> None:
        for _ in range(num_calls):
            side(x_TH)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)

    seconds = time_in_turn(
        {name: functools.partial(repeat, side) for name, side in sides.items()},
        args.rounds,
        wait_for_all=lambda: job.wait_for_all(args.timeout, "timing a layer"),
        slowest=lambda taken: max(job.all_gather(taken)) / num_calls,
    )
    return {
        "world_size": job.info.world_size,
        "tokens_per_rank": num_tokens,
        "seconds": {name: vars(spread) for name, spread in seconds.items()},
    }


def _to_markdown(results: Sequence[Result]) -> str:
    names = list(results[0]["seconds"])
    best = [name for name in names if name not in _PEERS]
    titles = ["ranks", "routing", "tokens a rank"]
    titles += [f"{name}, ms" for name in names]
    titles += [f"{peer} / {best[0]}" for peer in _PEERS]
    rows = []
    for result in results:
        seconds = result["seconds"]
        row = [result["world_size"], result["routing"], result["tokens_per_rank"]]
        row += [with_range(seconds[name], scale=_MS, digits=1) for name in names]
        own = seconds[best[0]]["median"]
        row += [f"{seconds[peer]['median'] / own:.1f}" for peer in _PEERS]
        rows.append(row)
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"One MoE layer with its router: {_SHAPE.num_experts} experts, top-{_SHAPE.top_k}, hidden "
        f"{_SHAPE.hidden_size}, expert width {_SHAPE.moe_intermediate_size}, float32. All sides "
        "have the same weights and compute the same outputs as transformers' block (checked before "
        "each row). Milliseconds are the median (least to most) of "
        f"{results[0]['seconds'][names[0]]['num_rounds']} rounds, the slowest rank's. DeepSpeed "
        "MoE drops no tokens. Ours is told the tokens of each rank, as infer.py announces them "
        "once for all layers of a pass."
    )


TABLE = Table(
    name="layer",
    heading="One MoE layer",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
)
