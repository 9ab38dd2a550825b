"""Phase 2: the groups give right values, and what their messages cost.

Values are compared with ones that are computed by hand, on the communicators the layers use; prices
of bytes are those that probe.py has measured for the cost model.
"""

# Shapes: W ranks of the group, T rows of this rank, R rows received, C columns

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from ds_moe_ep.bringup.report import FAIL, PASS, Check, judged
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.errors import some
from ds_moe_ep.moe.cost_model import LinkPrices
from ds_moe_ep.moe.dispatch import Links

__all__ = ["DecodeSize", "check_latency", "check_values", "describe_bandwidth", "wrong_values"]

TARGET_MS = 1.0
"""The most that a collective of the decode size should take."""

_WIDTH = 4
_LEAST_RUNS = 3
_MOST_RUNS = 30
# With more ranks than that on CPUs, mostly on few cores, a run takes up to half a second.
_MANY_RANKS = 16
_MOST_S = 1.0
_ON_CPU = "Ranks that share cores wait for each other's turns more than for the network"
_ON_GPU = "Look at the links (NCCL_DEBUG=INFO, nvidia-smi topo -m), or use fewer ranks a group"


@dataclass(frozen=True)
class DecodeSize:
    """What one decode step sends in a layer.

    Attributes:
        num_rows: Tokens of this rank: the batch.
        hidden_size: Their width.
        top_k: Experts of each.
        dtype: Their type.
    """

    num_rows: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype

    def describe(self) -> str:
        """Returns the size for people."""
        return f"{self.num_rows} x {self.hidden_size} {str(self.dtype).removeprefix('torch.')}"


def check_values(job: Job, links: Links) -> Check:
    """Runs each collective of each group with known values; all ranks call it."""
    groups = _groups(links)
    own = [
        f"{collective} {name} of {comm.size}"
        for name, comm in groups.items()
        for collective in wrong_values(comm, job.device)
    ]
    wrong = {
        f"[rank {rank} {job.hosts[rank]}] {problem}": None
        for rank, told in enumerate(job.all_gather(own))
        for problem in told
    }
    if wrong:
        return Check("values", FAIL, f"wrong values from: {some(list(wrong))}")
    told = ", ".join(f"{name} ({comm.size} ranks)" for name, comm in groups.items())
    return Check("values", PASS, f"all-gather, all-to-all and all-reduce are right: {told}")


def wrong_values(comm: Communicator, device: torch.device) -> list[str]:
    """Returns the collectives whose values are not those computed by hand, by name.

    Rows are of uneven numbers, none for some ranks; float32 holds all of these integers.
    """
    rank, ranks = comm.rank, range(comm.size)
    wrong = []
    send, recv = [(rank + to) % 3 for to in ranks], [(sender + rank) % 3 for sender in ranks]
    sent_RC = _rows([1000 * rank + to for to in ranks], send, device)
    received_RC = comm.exchange_rows((sent_RC,), send, recv)[0]
    if not torch.equal(received_RC, _rows([1000 * s + rank for s in ranks], recv, device)):
        wrong.append("all-to-all")

    counts = [1 + each % 3 for each in ranks]
    own_TC = _rows([100 + rank], [counts[rank]], device)
    gathered_RC = comm.gather_rows((own_TC,), counts)[0]
    if not torch.equal(gathered_RC, _rows([100 + each for each in ranks], counts, device)):
        wrong.append("all-gather")

    share_TC = _rows([(rank + 1) * row for row in (1, 2, 3)], [1, 1, 1], device)
    total = comm.size * (comm.size + 1) // 2
    expected_TC = _rows([total * row for row in (1, 2, 3)], [1, 1, 1], device)
    if not torch.equal(comm.sum_over_ranks(share_TC), expected_TC):
        wrong.append("all-reduce")
    return wrong


def _rows(values: Sequence[int], counts: Sequence[int], device: torch.device) -> torch.Tensor:
    """Returns rows of each value, so many of each ``[sum(counts), C]``."""
    column = torch.tensor(values, dtype=torch.float32, device=device)
    repeated = column.repeat_interleave(torch.tensor(counts, device=device))
    return repeated[:, None].expand(-1, _WIDTH).contiguous()


def check_latency(job: Job, links: Links, size: DecodeSize, *, thorough: bool) -> list[Check]:
    """Measures each collective of each group at the decode size; all ranks call it.

    Args:
        job: The job.
        links: The groups of this rank.
        size: What is sent.
        thorough: Whether to repeat for up to a second; otherwise a few times.

    Returns:
        A check a group, judged by its slowest collective: the median over runs of the slowest
        rank's time.
    """
    checks = []
    for name, comm in _groups(links).items():
        runs = _collectives(comm, size, job.device)
        own_ms = {kind: _time_ms(run, links.flat, job.device, thorough) for kind, run in runs}
        slowest: dict[str, float] = {}
        for of_rank in job.all_gather(own_ms):
            slowest = {kind: max(ms, slowest.get(kind, 0.0)) for kind, ms in of_rank.items()}
        told = ", ".join(f"{kind} {ms:.3g}" for kind, ms in slowest.items())
        checks.append(
            judged(
                f"latency {name}",
                round(max(slowest.values()), 4),
                TARGET_MS,
                "ms",
                f"{told} ms (p50, {size.describe()} a rank, {comm.size} ranks; "
                f"target {TARGET_MS:g})",
                missed=_ON_GPU if job.device.type == "cuda" else _ON_CPU,
            )
        )
    return checks


def _collectives(
    comm: Communicator, size: DecodeSize, device: torch.device
) -> list[tuple[str, Callable[[], object]]]:
    rows_TC = torch.zeros((size.num_rows, size.hidden_size), dtype=size.dtype, device=device)
    routed = [max(1, size.num_rows * size.top_k // comm.size)] * comm.size
    routed_RC = rows_TC[:1].repeat(sum(routed), 1)
    return [
        ("all-gather", partial(comm.gather_rows, (rows_TC,), [size.num_rows] * comm.size)),
        ("all-to-all", partial(comm.exchange_rows, (routed_RC,), routed, routed)),
        ("all-reduce", partial(comm.sum_over_ranks, rows_TC)),
    ]


def _time_ms(
    run: Callable[[], object], everyone: Communicator, device: torch.device, thorough: bool
) -> float:
    """Returns the median milliseconds of a collective, all ranks starting each run together."""
    is_crowded = device.type == "cpu" and everyone.size > _MANY_RANKS
    least_runs = 1 if is_crowded else _LEAST_RUNS
    run()  # the first is slower: connections open, buffers are made
    own_ns: list[int] = []
    while True:
        everyone.gather_ints([0], device)
        start_ns = time.perf_counter_ns()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        own_ns.append(time.perf_counter_ns() - start_ns)
        if len(own_ns) < least_runs:
            continue
        if not thorough or len(own_ns) >= _MOST_RUNS:
            break
        # All ranks must agree on when to stop.
        if max(ns for (ns,) in everyone.gather_ints([sum(own_ns)], device)) > _MOST_S * 1e9:
            break
    return median(own_ns) / 1e6


def describe_bandwidth(prices: LinkPrices) -> Check:
    """Tells what bytes cost in each group; the figure is that of the whole group."""
    groups = {"flat": prices.flat, "across": prices.across, "within": prices.within}
    speeds = {
        name: 1e-9 / group.exchange.s_per_byte if group.exchange.s_per_byte > 0 else None
        for name, group in groups.items()
        if group is not None
    }
    told = ", ".join(
        f"{name} {'too fast to tell' if speed is None else f'{speed:.3g} GB/s'}"
        for name, speed in speeds.items()
    )
    text = f"{told} (bytes a rank sends, in large messages)"
    return Check("bandwidth", PASS, text, measured=speeds["flat"], unit="GB/s")


def _groups(links: Links) -> Mapping[str, Communicator]:
    named = {"flat": links.flat, "across": links.across, "within": links.within}
    return {name: comm for name, comm in named.items() if comm is not None and comm.size > 1}
