"""Measures, for the cost model, messages between the ranks of an expert group, and experts.

All ranks measure together and agree on the mean of their figures, so that they choose alike. Not on
the slowest rank's: ranks that share cores start a message apart, and where one waits longer in one,
it waits less in the next.
"""

# Shapes: T rows of this rank, C columns, W ranks of the group

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

import torch

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.row_layout import RowLayout
from ds_moe_ep.moe.alltoall import sum_by_token
from ds_moe_ep.moe.cost_model import ExpertPrices, GroupPrices, LinkPrices, fit_prices
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.moe.experts import NOT_HERE, run_local_experts
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["measure_links"]

_ROW_BYTES = 1024
# What a rank sends in all in a large message: enough for its bytes to outweigh the latency.
_LARGE_BYTES = 512 * 1024
# Rows at a rank's experts: on a GPU more than it multiplies without looking which are chosen.
_EXPERT_ROWS_ON_GPU, _EXPERT_ROWS_ON_CPU = 1024, 32
# Rounds of all measurements, so that a moment in which the machine is busy spoils but one sample of
# each. With many ranks on few cores a round takes seconds; then two must do.
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 5
# In a round each collective runs so often, one after the other: to bring 64 ranks together first
# takes as long as most of them.
_RUNS = 3
_ENOUGH_S = 0.5


@dataclass(frozen=True)
class _Measurement:
    """What to repeat: of which group and kind, and how many bytes a rank sends, or rows it has."""

    group: str
    kind: str
    amount: int
    run: Callable[[], object]


def measure_links(
    links: Links, device: torch.device, layer: ExpertParallelMoE | None = None
) -> LinkPrices:
    """Measures the group, and its two levels where there are some; all ranks call it.

    It takes about half a second at most, with 64 ranks on two cores some ten.

    Args:
        links: The groups; what is measured counts in their statistics.
        device: Where rows live.
        layer: Whose experts to measure as well.
    """
    comms = {"flat": links.flat, "across": links.across, "within": links.within}
    found = {name: comm for name, comm in comms.items() if comm is not None}
    measurements = [m for name, comm in found.items() for m in _measurements(name, comm, device)]
    works = [_local_work(device), *(_expert_works(layer, device) if layer is not None else ())]
    measurements += [
        replace(work, run=partial(_work_and_meet, work.run, links.flat, device)) for work in works
    ]
    seconds = _time([measurement.run for measurement in measurements], links.flat, device)
    timed = list(zip(measurements, seconds, strict=True))
    prices = {name: _prices(name, comm.size, timed) for name, comm in found.items()}
    meeting_s = prices["flat"].gather.seconds(_ROW_BYTES * (links.flat.size - 1))
    work_s = {
        work.kind: max(0.0, min(of_work) - meeting_s) / work.amount
        for work, of_work in timed[-len(works) :]
    }
    experts = ExpertPrices(work_s["pairs"], work_s["slots"]) if layer is not None else None
    return LinkPrices(**prices, local_s_per_byte=work_s["bytes"], experts=experts)


def _measurements(name: str, comm: Communicator, device: torch.device) -> list[_Measurement]:
    """Lists what is measured of a group: numbers of rows, and two sizes of each other kind."""
    size = comm.size
    one_each_W = torch.ones(size, dtype=torch.int64, device=device)
    found = [_Measurement(name, "counts", 0, partial(comm.exchange_counts, one_each_W))]
    for num_rows in (1, max(2, _LARGE_BYTES // _ROW_BYTES // size)):
        rows_TC = torch.zeros((num_rows, _ROW_BYTES // 4), device=device)
        rows_RC, counts = rows_TC.repeat(size, 1), [num_rows] * size
        runs = {
            "exchange": partial(comm.exchange_rows, (rows_RC,), counts, counts),
            "gather": partial(comm.gather_rows, (rows_TC,), counts),
            "reduce": partial(comm.reduce_rows, rows_RC, counts),
        }
        num_bytes = (size - 1) * num_rows * _ROW_BYTES
        found += [_Measurement(name, kind, num_bytes, run) for kind, run in runs.items()]
    return found


def _work_and_meet(work: Callable[[], object], comm: Communicator, device: torch.device) -> None:
    """Does what a rank does itself. Where ranks share cores, it takes as long as all need."""
    with torch.no_grad():
        work()
    row_TC = torch.zeros((1, _ROW_BYTES // 4), device=device)
    comm.gather_rows((row_TC,), [1] * comm.size)


def _local_work(device: torch.device) -> _Measurement:
    """Returns what a rank does with rows that go to some ranks each, and come back."""
    num_rows = _LARGE_BYTES // _ROW_BYTES
    rows_TC = torch.zeros((num_rows, _ROW_BYTES // 4), device=device)
    order_T = torch.randperm(num_rows, device=device)

    def run() -> None:
        sent = (rows_TC.index_select(0, order_T), order_T[:, None])
        RowLayout(sent).pack(sent)
        sum_by_token(rows_TC, order_T, None, rows_TC)

    return _Measurement("work", "bytes", num_rows * _ROW_BYTES, run)


def _expert_works(layer: ExpertParallelMoE, device: torch.device) -> list[_Measurement]:
    """Returns what a rank's experts do with rows that chose one each, and that chose none."""
    experts = layer.deepspeed_moe.experts
    num_rows = _EXPERT_ROWS_ON_GPU if device.type == "cuda" else _EXPERT_ROWS_ON_CPU
    x_TH = torch.zeros(
        (num_rows, layer.hidden_size), dtype=next(experts.parameters()).dtype, device=device
    )
    weights_T1 = torch.ones((num_rows, 1), device=device)
    spread_T1 = torch.arange(num_rows, device=device)[:, None] % layer.num_local_experts
    works = []
    for kind, ids_T1 in ("pairs", spread_T1), ("slots", torch.full_like(spread_T1, NOT_HERE)):
        run = partial(run_local_experts, experts, x_TH, ids_T1, weights_T1)
        works.append(_Measurement("work", kind, num_rows, run))
    return works


def _prices(
    name: str, size: int, timed: Sequence[tuple[_Measurement, Sequence[float]]]
) -> GroupPrices:
    samples_of: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for measurement, seconds in timed:
        if measurement.group == name:
            samples_of[measurement.kind] += [(measurement.amount, s) for s in seconds]
    counts_s = min(seconds for _, seconds in samples_of.pop("counts"))
    return GroupPrices(size=size, counts_s=counts_s, **fit_prices(samples_of))


def _time(
    runs: Sequence[Callable[[], object]], everyone: Communicator, device: torch.device
) -> list[list[float]]:
    """Repeats collectives in turn, all ranks starting each together.

    Returns:
        The seconds of each run of each collective, of the ranks on average.
    """
    for run in runs:
        run()  # the first is slower: connections open, buffers are made
    rounds: list[list[float]] = []
    while len(rounds) < _LEAST_ROUNDS or (
        len(rounds) < _MOST_ROUNDS and sum(map(sum, rounds)) < _ENOUGH_S
    ):
        own_ns = []
        for run in runs:
            everyone.gather_ints([0], device)
            for _ in range(_RUNS):
                start_ns = time.perf_counter_ns()
                run()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                own_ns.append(time.perf_counter_ns() - start_ns)
        all_ns = everyone.gather_ints(own_ns, device)
        rounds.append([mean(each_ns) / 1e9 for each_ns in zip(*all_ns, strict=True)])
    return [
        [each for seconds in rounds for each in seconds[first : first + _RUNS]]
        for first in range(0, len(runs) * _RUNS, _RUNS)
    ]
