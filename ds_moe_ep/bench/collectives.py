"""`bench collectives`: what the links between ranks do, flat and two-level, by message size."""

# Shapes: T rows of this rank, R rows of all, C columns

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.bench import deepspeed_shm
from ds_moe_ep.bench.deepspeed_shm import DEEPSPEED, OURS
from ds_moe_ep.bench.layer_sides import time_sides
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.groups import Job, create_expert_groups
from ds_moe_ep.dist.node_groups import create_node_groups, open_within_nodes
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.moe.dispatch import Links, make_links
from ds_moe_ep.moe.probe import measure_links

__all__ = ["TABLE", "open_links"]

_MS = 1000.0
_MB = 1_000_000
_ROW_BYTES = 1024
# Ranks leave a barrier one after the other, and now and then on one core, where they stay for some
# milliseconds, which is not to be measured. So many calls of the quickest take some milliseconds.
_MOST_CALLS = 200


def _all_to_all(comm: Communicator, rows_RC: Tensor) -> Tensor:
    counts = [len(rows_RC) // comm.size] * comm.size
    return comm.exchange_rows((rows_RC,), counts, counts)[0]


def _all_gather(comm: Communicator, rows_TC: Tensor) -> Tensor:
    return comm.gather_rows((rows_TC,), [len(rows_TC)] * comm.size)[0]


def _reduce(comm: Communicator, rows_RC: Tensor) -> Tensor:
    return comm.reduce_rows(rows_RC, [len(rows_RC) // comm.size] * comm.size)


def _all_reduce(comm: Communicator, rows_TC: Tensor) -> Tensor:
    return comm.sum_over_ranks(rows_TC)


@dataclass(frozen=True)
class _Collective:
    """One kind: what it does, whether a rank begins with a message for each, and where it ends."""

    run: Callable[[Communicator, Tensor], Tensor]
    has_one_each: bool = False
    is_within_first: bool = False


_ALL_REDUCE = "all-reduce"
_COLLECTIVES = {
    "all-to-all": _Collective(_all_to_all, has_one_each=True),
    "all-gather": _Collective(_all_gather),
    "reduce": _Collective(_reduce, has_one_each=True, is_within_first=True),
    _ALL_REDUCE: _Collective(_all_reduce, is_within_first=True),
}
_FLAT, _TWO_LEVEL = "flat", "two-level"
_ABOUT_DEEPSPEED = (
    " DeepSpeed's shared memory is its extension in C++ for all-reduce, whose ranks keep a core "
    "busy while they wait; ours sleep if it takes long.\n\n"
    "One MoE layer of a replicated batch with `--dispatcher allreduce` "
    f"({SHAPES['105M'].describe_layer()}), by what sums its outputs:\n\n"
)
_FITTED = {"exchange": "all-to-all", "gather": "all-gather", "reduce": "reduce"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks")
    parser.add_argument(
        "--message-kib",
        type=int,
        nargs="+",
        default=[1, 16, 256],
        metavar="KIB",
        help="what a rank has for each other rank",
    )
    parser.add_argument(
        "--deepspeed-shm",
        action="store_true",
        help="also DeepSpeed's all-reduce through shared memory, which is built first (takes g++)",
    )


def _prepare(args: argparse.Namespace, work: Path) -> None:
    if args.deepspeed_shm:
        deepspeed_shm.build()


def open_links(job: Job, timeout_s: float) -> tuple[dist.ProcessGroup, SharedMemory | None, Links]:
    """Returns a group of all ranks, the memory they share, and how rows go between them."""
    size = job.info.world_size
    group, node_groups = create_expert_groups(size), create_node_groups(size, job.nodes)
    shared = open_within_nodes(group, node_groups, job.nodes, timeout_s=timeout_s)
    return group, shared, make_links(group, node_groups, shared=shared)


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    group, shared, links = open_links(job, args.timeout)
    ways = {_FLAT: [Communicator(group)]}
    if links.across is not None and links.within is not None:
        ways[_TWO_LEVEL] = [links.across, links.within]
    elif shared is not None:
        ways[OURS] = [links.flat]
    peer = deepspeed_shm.open_all_reduce(job) if args.deepspeed_shm else nullcontext()
    with peer as peer_all_reduce:
        times = _time_all(args, job, ways, peer_all_reduce)
        layers = []
        if peer_all_reduce is not None:
            layers = deepspeed_shm.time_layers(
                job, peer_all_reduce, rounds=args.rounds, timeout_s=args.timeout
            )
    prices = asdict(measure_links(links, job.device))
    local_s_per_byte = prices.pop("local_s_per_byte")
    return [
        {
            "world_size": job.info.world_size,
            "num_nodes": len(set(job.nodes)),
            "times": times,
            "layers": layers,
            "fit": {level: price for level, price in prices.items() if price is not None},
            "local_s_per_byte": local_s_per_byte,
        }
    ]


def _time_all(
    args: argparse.Namespace,
    job: Job,
    ways: Mapping[str, Sequence[Communicator]],
    peer_all_reduce: Callable[[Tensor], Tensor] | None,
) -> list[Result]:
    size, times = job.info.world_size, []
    for kib in args.message_kib:
        for name, collective in _COLLECTIVES.items():
            num_rows = kib * 1024 // _ROW_BYTES * (size if collective.has_one_each else 1)
            rows = torch.zeros((num_rows, _ROW_BYTES // 4), device=job.device)
            sides: dict[str, Callable[[Tensor], Tensor]] = {
                way: functools.partial(_pass_on, collective, comms) for way, comms in ways.items()
            }
            if name == _ALL_REDUCE and peer_all_reduce is not None:
                sides[DEEPSPEED] = peer_all_reduce
            spreads = time_sides(
                job,
                sides,
                rows,
                rounds=args.rounds,
                timeout_s=args.timeout,
                most_calls=_MOST_CALLS,
            )
            times += [
                {"collective": name, "way": way, "message_bytes": kib * 1024, **vars(spread)}
                for way, spread in spreads.items()
            ]
    return times


def _pass_on(collective: _Collective, comms: Sequence[Communicator], rows: Tensor) -> Tensor:
    """Does the collective in one group after the other."""
    for comm in reversed(comms) if collective.is_within_first else comms:
        rows = collective.run(comm, rows)
    return rows


def _to_markdown(results: Sequence[Result]) -> str:
    titles = ["collective", "ranks", "nodes", "way", "message, KiB", "ms", "MB/s"]
    rows, fitted = [], []
    for result in results:
        size, where = result["world_size"], (result["world_size"], result["num_nodes"])
        for time in result["times"]:
            rate = (size - 1) * time["message_bytes"] / time["median"] / _MB
            rows.append(
                [time["collective"], *where, time["way"], time["message_bytes"] // 1024]
                + [with_range(time, scale=_MS), f"{rate:,.1f}"]
            )
        for level, prices in result["fit"].items():
            row = [level, *where, prices["size"], f"{prices['counts_s'] * _MS:.3f}"]
            for kind in _FITTED:
                rate = _rate(prices[kind]["s_per_byte"])
                row.append(f"{prices[kind]['latency_s'] * _MS:.3f} + {rate}")
            fitted.append([*row, _rate(result["local_s_per_byte"])])
    all_times = [time for result in results for time in result["times"]]
    rounds = all_times[0]["num_rounds"]
    fit_titles = ["links", "ranks", "nodes", "ranks of a group", "numbers of rows, ms"]
    fit_titles += [f"{name}, ms + MB/s" for name in _FITTED.values()]
    fit_titles.append("sorting rows by rank and summing them, MB/s")
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"Milliseconds are the median (least to most) of {rounds} rounds of up to {_MOST_CALLS} "
        "calls, the slowest rank's. A message is what a rank has for each other rank: of its own "
        "rows (all-to-all), its rows (all-gather), its share of that rank's sum (reduce), or the "
        "tensor that all sum (all-reduce). MB/s are the messages of all other ranks to one, by the "
        "time: what it gets, however it travels. On gloo everything is all-to-all, with sums made "
        "by the rank that needs them. Two-level: across the nodes and within them (sums the other "
        "way round), where there are several; within a node rows go by shared memory if there is "
        "room."
        f"{_layers_to_markdown(results)}\n\n"
        "What `--dispatcher auto` fits to such links when it starts, a latency and a rate of the "
        "bytes of the rank that sends or receives most:\n\n"
        f"{markdown_table(fit_titles, fitted)}"
    )


def _rate(s_per_byte: float) -> str:
    """Returns MB/s; none where bytes took no time that could be measured."""
    return f"{1 / s_per_byte / _MB:,.0f}" if s_per_byte else "-"


def _layers_to_markdown(results: Sequence[Result]) -> str:
    titles = ["ranks", "tokens", f"{OURS}, ms", f"{DEEPSPEED}, ms", "ratio"]
    rows = []
    for result in results:
        for layer in result["layers"]:
            ours, peer = layer["seconds"][OURS], layer["seconds"][DEEPSPEED]
            shown = [with_range(spread, scale=_MS) for spread in (ours, peer)]
            ratio = f"{peer['median'] / ours['median']:.2f}"
            rows.append([result["world_size"], layer["num_tokens"], *shown, ratio])
    return f"{_ABOUT_DEEPSPEED}{markdown_table(titles, rows)}" if rows else ""


def _variant(args: argparse.Namespace) -> tuple[str, str] | None:
    return ("deepspeed-shm", f"and {DEEPSPEED}") if args.deepspeed_shm else None


TABLE = Table(
    name="collectives",
    heading="What the links do",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
    variant=_variant,
)
