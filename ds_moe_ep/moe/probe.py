"""Measures what the links of an expert group charge for messages, for the cost model.

All ranks measure together and agree on the slowest rank's figures, so that they choose alike.
"""

# Shapes: T rows of this rank, C columns, W ranks of the group

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, fit_prices
from ds_moe_ep.moe.dispatch import Links

__all__ = ["measure_links"]

_ROW_BYTES = 1024
# What a rank sends in all in a large message: enough for its bytes to outweigh the latency.
_LARGE_BYTES = 512 * 1024
_REPEATS = 5
# A kind of collective that has taken this long is not repeated: with many ranks on few cores one
# takes a tenth of a second.
_ENOUGH_S = 0.05


def measure_links(links: Links, device: torch.device) -> LinkPrices:
    """Measures the group, and its two levels where there are some; all ranks call it.

    It takes about half a second at most, with 64 ranks on two cores a few.

    Args:
        links: The groups; what is measured counts in their statistics.
        device: Where rows live.
    """

    def measured(comm: Communicator | None) -> GroupPrices | None:
        return None if comm is None else _measure_group(comm, links.flat, device)

    return LinkPrices(
        _measure_group(links.flat, links.flat, device),
        across=measured(links.across),
        within=measured(links.within),
    )


def _measure_group(comm: Communicator, everyone: Communicator, device: torch.device) -> GroupPrices:
    size = comm.size
    one_each_W = torch.ones(size, dtype=torch.int64, device=device)

    def exchange_counts(rows_TC: Tensor) -> None:
        comm.exchange_counts(one_each_W)

    def exchange(rows_TC: Tensor) -> None:
        counts = [len(rows_TC)] * size
        comm.exchange_rows((rows_TC.repeat(size, 1),), counts, counts)

    def gather(rows_TC: Tensor) -> None:
        comm.gather_rows((rows_TC,), [len(rows_TC)] * size)

    def reduce(rows_TC: Tensor) -> None:
        comm.reduce_rows(rows_TC.repeat(size, 1), [len(rows_TC)] * size)

    def samples(run: Callable[[Tensor], None], num_rows: int) -> list[tuple[int, float]]:
        rows_TC = torch.zeros((num_rows, _ROW_BYTES // 4), device=device)
        num_bytes = (size - 1) * num_rows * _ROW_BYTES
        return [(num_bytes, s) for s in _time(partial(run, rows_TC), everyone, device)]

    num_rows = max(2, _LARGE_BYTES // _ROW_BYTES // size)
    prices = fit_prices(
        {
            run.__name__: samples(run, 1) + samples(run, num_rows)
            for run in (exchange, gather, reduce)
        }
    )
    counts_s = min(seconds for _, seconds in samples(exchange_counts, 1))
    return GroupPrices(size=size, counts_s=counts_s, **prices)


def _time(run: Callable[[], None], everyone: Communicator, device: torch.device) -> list[float]:
    """Repeats a collective, ranks starting together; returns the slowest rank's seconds of each."""
    run()  # the first is slower: connections open, buffers are made
    seconds: list[float] = []
    while len(seconds) < _REPEATS and sum(seconds) < _ENOUGH_S:
        everyone.gather_ints([0], device)
        start_ns = time.perf_counter_ns()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent_ns = time.perf_counter_ns() - start_ns
        seconds.append(max(ns for (ns,) in everyone.gather_ints([spent_ns], device)) / 1e9)
    return seconds
