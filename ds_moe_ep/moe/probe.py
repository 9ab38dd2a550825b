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
from dataclasses import dataclass
from functools import partial
from statistics import mean

import torch
from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.row_layout import RowLayout
from ds_moe_ep.moe.alltoall import sum_by_token
from ds_moe_ep.moe.cost_model import ExpertPrices, GroupPrices, LinkPrices, fit_prices
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.moe.experts import NOT_HERE, run_local_experts
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["measure_links"]

_ROW_BYTES = 1024
# What a rank sends in all in a large message: enough for its bytes to outweigh the latency, which
# takes some tens of MiB at the rates of NVLink.
_LARGE_BYTES, _LARGE_BYTES_ON_GPU = 2**19, 2**26
# Rows that a rank sorts; a GPU needs two sizes, as a kernel takes some microseconds however few
# they are.
_SORTED_ROWS, _SORTED_ROWS_ON_GPU = (512,), (512, 16384)
# Rows at its experts on a GPU: so many bytes, as a run holds some eight times as much, and weights
# may leave little; but half of them must be more than is multiplied without looking which chose.
_EXPERT_BYTES, _LEAST_EXPERT_ROWS, _MOST_EXPERT_ROWS = 2**25, 2048, 16384
# About 1, 10 and 100 ms, in which a GPU does nothing and is told what to do next.
_SLEEP_CYCLES = (2_000_000, 20_000_000, 200_000_000)
# Rounds of all measurements, so that a moment in which the machine is busy spoils but one sample of
# each. With many ranks on few cores a round takes seconds; then two must do.
_LEAST_ROUNDS, _MOST_ROUNDS = 2, 5
# In a round each collective runs so often, one after the other: to bring 64 ranks together first
# takes as long as most of them.
_RUNS = 3
_ENOUGH_S = 0.5


_Clock = Callable[[Callable[[], object]], float]
"""Does something once, and returns the seconds it took."""


@dataclass(frozen=True)
class _Measurement:
    """What to repeat.

    Attributes:
        group: Of which group it is a collective; "work" if it is none.
        kind: Which.
        amount: How many bytes a rank sends, or rows it has.
        seconds: Does it once, and returns how long it took.
    """

    group: str
    kind: str
    amount: int
    seconds: Callable[[], float]


def measure_links(
    links: Links, device: torch.device, layer: ExpertParallelMoE | None = None
) -> LinkPrices:
    """Measures the group, and its two levels where there are some; all ranks call it.

    It takes until what it measures adds up to half a second, but two rounds at least, which with 64
    ranks on two cores take some ten seconds.

    Args:
        links: The groups; what is measured counts in their statistics.
        device: Where rows live.
        layer: Whose experts to measure as well, on a GPU. On a CPU the choice does not hang on
            them.
    """
    comms = {"flat": links.flat, "across": links.across, "within": links.within}
    found = {name: comm for name, comm in comms.items() if comm is not None}
    measurements = [m for name, comm in found.items() for m in _measurements(name, comm, device)]
    measurements += _works(links.flat, layer, device)
    seconds = _time([measurement.seconds for measurement in measurements], links.flat, device)
    timed = list(zip(measurements, seconds, strict=True))
    prices = {name: _prices(comm.size, _samples_of(name, timed)) for name, comm in found.items()}
    meeting_s = prices["flat"].gather.seconds(_ROW_BYTES * (links.flat.size - 1))
    nothing = [] if device.type == "cuda" else [(0, meeting_s)]
    # Seconds of a byte, or of a row.
    work = {
        kind: fit_prices({kind: [*nothing, *samples]})[kind].s_per_byte
        for kind, samples in _samples_of("work", timed).items()
    }
    experts = None
    if "slots" in work:
        experts = ExpertPrices(max(0.0, work["pairs"] - work["slots"]), work["slots"])
    return LinkPrices(**prices, local_s_per_byte=work["bytes"], experts=experts)


def _clock(run: Callable[[], object], device: torch.device) -> float:
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start_s


def _clock_until_all_are_done(comm: Communicator, run: Callable[[], object]) -> float:
    """Times work of a rank: where ranks share cores, it takes as long as all of them need."""
    row_TC = torch.zeros((1, _ROW_BYTES // 4))

    def run_and_meet() -> None:
        run()
        comm.gather_rows((row_TC,), [1] * comm.size)

    return _clock(run_and_meet, row_TC.device)


def _gpu_clock(run: Callable[[], object]) -> float:
    """Times what a GPU does, not how long it takes to tell it, which a graph or much work hides."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for cycles in _SLEEP_CYCLES:
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        is_told_in_time = not start.query()  # it still sleeps
        end.synchronize()
        if is_told_in_time:
            break
    return start.elapsed_time(end) / 1e3


def _measurements(name: str, comm: Communicator, device: torch.device) -> list[_Measurement]:
    """Lists what is measured of a group: numbers of rows, and two sizes of each other kind."""
    size = comm.size
    one_each_W = torch.ones(size, dtype=torch.int64, device=device)
    count = partial(comm.exchange_counts, one_each_W)
    found = [_Measurement(name, "counts", 0, partial(_clock, count, device))]
    large_bytes = _LARGE_BYTES_ON_GPU if device.type == "cuda" else _LARGE_BYTES
    for num_rows in (1, max(2, large_bytes // _ROW_BYTES // size)):
        rows_TC = torch.zeros((num_rows, _ROW_BYTES // 4), device=device)
        rows_RC, counts = rows_TC.repeat(size, 1), [num_rows] * size
        runs = {
            "exchange": partial(comm.exchange_rows, (rows_RC,), counts, counts),
            "gather": partial(comm.gather_rows, (rows_TC,), counts),
            "reduce": partial(comm.reduce_rows, rows_RC, counts),
        }
        num_bytes = (size - 1) * num_rows * _ROW_BYTES
        found += [
            _Measurement(name, kind, num_bytes, partial(_clock, run, device))
            for kind, run in runs.items()
        ]
    return found


def _works(
    comm: Communicator, layer: ExpertParallelMoE | None, device: torch.device
) -> list[_Measurement]:
    """Lists what is measured of a rank's own work."""
    on_gpu = device.type == "cuda"
    clock = _gpu_clock if on_gpu else partial(_clock_until_all_are_done, comm)
    sorted_rows = _SORTED_ROWS_ON_GPU if on_gpu else _SORTED_ROWS
    works = [_sorting(num_rows, clock, device) for num_rows in sorted_rows]
    if layer is not None and on_gpu:
        like = next(layer.deepspeed_moe.experts.parameters())
        most = _EXPERT_BYTES // (layer.hidden_size * like.element_size())
        most = min(max(most, _LEAST_EXPERT_ROWS), _MOST_EXPERT_ROWS)
        x_TH = like.new_zeros((most, layer.hidden_size))
        for rows_TH in (x_TH[: most // 2], x_TH):
            here_T1 = torch.arange(len(rows_TH), device=device)[:, None] % layer.num_local_experts
            works.append(_experts(layer, "pairs", rows_TH, here_T1, clock))
            nowhere_T1 = torch.full_like(here_T1, NOT_HERE)
            works.append(_experts(layer, "slots", rows_TH, nowhere_T1, clock))
    return works


def _sorting(num_rows: int, clock: _Clock, device: torch.device) -> _Measurement:
    """Returns what a rank does with rows that go to some ranks each, and come back."""
    rows_TC = torch.zeros((num_rows, _ROW_BYTES // 4), device=device)
    order_T = torch.randperm(num_rows, device=device)

    def run() -> None:
        sent = (rows_TC.index_select(0, order_T), order_T[:, None])
        RowLayout(sent).pack(sent)
        sum_by_token(rows_TC, order_T, None, rows_TC)

    return _Measurement("work", "bytes", num_rows * _ROW_BYTES, partial(clock, run))


def _experts(
    layer: ExpertParallelMoE, kind: str, x_TH: Tensor, local_ids_T1: Tensor, clock: _Clock
) -> _Measurement:
    """Returns what a rank's experts do with rows that chose one each, or none of them."""
    experts, num_rows = layer.deepspeed_moe.experts, len(x_TH)
    weights_T1 = torch.ones((num_rows, 1), device=x_TH.device)
    run = torch.no_grad()(partial(run_local_experts, experts, x_TH, local_ids_T1, weights_T1))
    return _Measurement("work", kind, num_rows, partial(clock, run))


def _samples_of(
    group: str, timed: Sequence[tuple[_Measurement, Sequence[float]]]
) -> dict[str, list[tuple[int, float]]]:
    """Returns what was measured of a group: amounts and seconds, by kind."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for measurement, seconds in timed:
        if measurement.group == group:
            found[measurement.kind] += [(measurement.amount, s) for s in seconds]
    return found


def _prices(size: int, samples_of: dict[str, list[tuple[int, float]]]) -> GroupPrices:
    counts_s = min(seconds for _, seconds in samples_of.pop("counts"))
    return GroupPrices(size=size, counts_s=counts_s, **fit_prices(samples_of))


def _time(
    clocks: Sequence[Callable[[], float]], everyone: Communicator, device: torch.device
) -> list[list[float]]:
    """Repeats measurements in turn, all ranks starting each together.

    Returns:
        The seconds of each run of each, of the ranks on average.
    """
    for clock in clocks:
        clock()  # the first is slower: connections open, buffers are made
    rounds: list[list[float]] = []
    while len(rounds) < _LEAST_ROUNDS or (
        len(rounds) < _MOST_ROUNDS and sum(map(sum, rounds)) < _ENOUGH_S
    ):
        own_ns = []
        for clock in clocks:
            everyone.gather_ints([0], device)
            own_ns += [round(clock() * 1e9) for _ in range(_RUNS)]
        all_ns = everyone.gather_ints(own_ns, device)
        rounds.append([mean(each_ns) / 1e9 for each_ns in zip(*all_ns, strict=True)])
    return [
        [each for seconds in rounds for each in seconds[first : first + _RUNS]]
        for first in range(0, len(clocks) * _RUNS, _RUNS)
    ]
