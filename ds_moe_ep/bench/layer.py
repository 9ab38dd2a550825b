"""`bench layer`: one MoE layer, by tokens a rank and routing, against DeepSpeed's own layers."""

# Shapes: N tokens of all ranks, T tokens of this one, H hidden

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Container, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.bench.layer_sides import (
    LayerSide,
    OurLayer,
    add_shape_argument,
    autoep,
    build_one_layer,
    check_equal,
    deepspeed_moe,
    time_sides,
    transformers_block,
    tutel,
)
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.routing import ROUTINGS, routed_tokens
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.dispatch import TWO_LEVEL

__all__ = ["TABLE"]

_TOKENS = (1, 4, 16, 64, 256, 1024)
_OURS = ("auto", "alltoall", "allgather")
_TUTEL = "Tutel"
_PEERS = {"DeepSpeed MoE": deepspeed_moe, "DeepSpeed AutoEP": autoep, _TUTEL: tutel}
_FLAT_AND_TWO_LEVEL = (
    " Flat dispatchers (alltoall, allgather) bring rows to all ranks in one step; 2level ones "
    "across hosts first, then within each by shared memory."
)
_MS = 1000.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    add_shape_argument(parser)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=_TOKENS, metavar="T", help="tokens a rank"
    )
    parser.add_argument(
        "--routing",
        nargs="+",
        choices=ROUTINGS,
        default=list(ROUTINGS),
        help="how tokens choose experts",
    )
    parser.add_argument(
        "--dispatchers",
        nargs="+",
        default=_OURS,
        metavar="D",
        help="dispatchers of ours; all are compared with the first",
    )
    parser.add_argument(
        "--peers",
        nargs="*",
        choices=_PEERS,
        default=_installed(),
        metavar="P",
        help=f"others to compare with: {', '.join(_PEERS)}; none named: ours alone",
    )


def _installed() -> list[str]:
    return [name for name in _PEERS if name != _TUTEL or importlib.util.find_spec("tutel")]


def _prepare(args: argparse.Namespace, work: Path) -> None:
    if missing := set(args.peers) - set(_installed()):
        raise ConfigError(
            f"--peers {missing.pop()} is not installed. Build it from its repository "
            "(github.com/microsoft/Tutel, on a CPU with NO_CUDA=1), or name other peers: "
            f"{', '.join(_installed())}."
        )


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model = build_one_layer(SHAPES[args.shape])
    reference = transformers_block(model)
    announced = [0]
    ours = {
        name: OurLayer(model, job, name, lambda: announced * job.info.world_size)
        for name in args.dispatchers
    }
    sides: dict[str, LayerSide] = {**ours}
    sides |= {name: _PEERS[name](model, job) for name in args.peers}
    results = []
    for routing in args.routing:
        for num_tokens in args.tokens:
            x_TH = _own_tokens(job, model, routing, num_tokens)
            announced[0] = num_tokens
            for name, side in sides.items():
                check_equal(job, name, side(x_TH.to(job.device)), reference(x_TH))
            seconds = time_sides(job, sides, x_TH, rounds=args.rounds, timeout_s=args.timeout)
            results.append(
                {
                    "world_size": job.info.world_size,
                    "shape": args.shape,
                    "routing": routing,
                    "tokens_per_rank": num_tokens,
                    "seconds": {name: vars(spread) for name, spread in seconds.items()},
                    "chosen": {
                        name: choices
                        for name, side in ours.items()
                        if (choices := side.take_choices())
                    },
                }
            )
    return results


def _own_tokens(job: Job, model: Any, routing: str, num_tokens: int) -> Tensor:
    _, x_NH = routed_tokens(model, routing, num_tokens * job.info.world_size, seed=num_tokens)
    return x_NH.split(num_tokens)[job.info.rank]


def _to_markdown(results: Sequence[Result]) -> str:
    names = list(results[0]["seconds"])
    ours = [name for name in names if name not in _PEERS]
    rivals = {name: [name] for name in names if name in _PEERS}
    flat = [name for name in ours[1:] if name not in TWO_LEVEL]
    if flat and set(ours) & set(TWO_LEVEL):
        rivals |= {"best flat": flat} | {name: [name] for name in flat}
    titles = ["ranks", "routing", "tokens a rank", *(f"{name}, ms" for name in names)]
    titles += [f"{rival} / {ours[0]}" for rival in rivals]
    titles += [f"{ours[0]} / best other"] if ours[1:] else []
    # On one rank auto has nothing to choose.
    choosers = list(dict.fromkeys(name for result in results for name in result["chosen"]))
    titles += [f"{name} chose" for name in choosers]
    rows, of_best = [], []
    for result in results:
        seconds = result["seconds"]
        row = [result["world_size"], result["routing"], result["tokens_per_rank"]]
        row += [with_range(seconds[name], scale=_MS, digits=1) for name in names]
        own = seconds[ours[0]]["median"]
        best = [min(seconds[each]["median"] for each in rival) for rival in rivals.values()]
        row += [f"{seconds_s / own:.1f}" for seconds_s in best]
        if ours[1:]:
            of_best.append(own / min(seconds[each]["median"] for each in ours[1:]))
            row.append(f"{of_best[-1]:.2f}")
        row += [", ".join(result["chosen"].get(name, "-")) for name in choosers]
        rows.append(row)
    return f"{markdown_table(titles, rows)}\n\n{_about(results, names, rivals, of_best)}"


def _about(
    results: Sequence[Result],
    names: Sequence[str],
    rivals: Container[str],
    of_best: Sequence[float],
) -> str:
    text = (
        f"One MoE layer with its router: {SHAPES[results[0]['shape']].describe_layer()}, float32. "
        "All sides have the same weights and compute the same outputs as transformers' block "
        "(checked before each row). Milliseconds are the median (least to most) of "
        f"{results[0]['seconds'][names[0]]['num_rounds']} rounds, the slowest rank's. "
    )
    if _TUTEL in names:
        text += "DeepSpeed MoE and Tutel drop no tokens. "
    elif "DeepSpeed MoE" in names:
        text += "DeepSpeed MoE drops no tokens. "
    text += (
        "Ours is told the tokens of each rank, as infer.py announces them once for all layers of a "
        "pass."
    )
    if of_best:
        text += (
            f" {names[0]} takes {median(of_best):.2f} times what the best other of ours does in "
            f"the middle of {len(of_best)} rows, and {max(of_best):.2f} times at most."
        )
    return text + (_FLAT_AND_TWO_LEVEL if "best flat" in rivals else "")


def _variant(args: argparse.Namespace) -> tuple[str, str] | None:
    return None if args.peers else ("ours", "our dispatchers alone")


TABLE = Table(
    name="layer",
    heading="One MoE layer",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
    variant=_variant,
)
