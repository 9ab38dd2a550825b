"""How rows travel between the ranks of a group: by gloo or NCCL, or by memory that they share.

It moves tensors and counts what that costs; gradients are the business of collectives.py.
"""

# Shapes: W ranks of the group, T rows of this rank, S rows sent, R rows received, C columns

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.dist.comm_stats import CommStats
from ds_moe_ep.dist.group_timeout import patience_of
from ds_moe_ep.dist.moments import now, wait_within
from ds_moe_ep.dist.shared_memory import SharedMemory

__all__ = ["Meanwhile", "Transport"]

Meanwhile = Callable[[], None]
"""Local work to do, once, while rows travel; it must not use the communicator that they go by."""

# A sum over ranks of up to this many bytes is exchanged whole, in one message to each rank; a
# larger one in two, of a share each. Through shared memory a second exchange costs more than bytes.
_ONE_SHOT_BYTES = 64 * 1024
_ONE_SHOT_SHARED_BYTES = 512 * 1024


class Transport:
    """What brings rows from rank to rank in one expert group.

    Args:
        group: The process group, or None for a group of one, where nothing travels.
        stats: Where costs are counted; by default in a record of its own.
        shared: Memory that all ranks of the group share; rows go by it.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        stats: CommStats | None = None,
        shared: SharedMemory | None = None,
    ) -> None:
        self.group = group
        self._shared = shared
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.stats = CommStats() if stats is None else stats
        # gloo passes rows around a ring for all but its all-to-all, which talks to every rank at
        # once. With 8 ranks and 4 KiB each: 3 ms, against 11 for all-gather, 19 for reduce-scatter
        # and 21 for all-reduce (2 shared cores, torch 2.13).
        self._only_exchanges = group is not None and dist.get_backend(group) == "gloo"

    def gather_ints(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """Tells every rank a few integers of each (a device-to-host sync on a GPU).

        Args:
            values: Those of this rank, as many on every rank.
            device: Where the group's tensors live.

        Returns:
            The values of each rank.

        Raises:
            DistributedError: On a GPU: they did not come in time.
        """
        if self.size == 1:
            return [list(values)]
        row_1C = torch.tensor([values], device=device)
        return self._to_host(self.gather(row_1C, [1] * self.size)).tolist()

    def exchange_counts(self, send_counts_W: Tensor) -> tuple[list[int], list[int]]:
        """Tells every rank how many rows it will get from this one.

        Args:
            send_counts_W: int64 ``[W]``, rows for each rank of the group, on the device of the
                rows.

        Returns:
            Rows to send to and to receive from each rank, as host integers (a device-to-host sync
            on a GPU).

        Raises:
            DistributedError: On a GPU: the others did not come in time.
        """
        if self.size == 1:
            counts = send_counts_W.tolist()
            return counts, counts
        ones = [1] * self.size
        recv_counts_W = self.exchange(send_counts_W[:, None], ones, ones, kind="counts")[:, 0]
        send, recv = self._to_host(torch.stack((send_counts_W, recv_counts_W))).tolist()
        return send, recv

    def exchange(
        self,
        rows_SC: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        meanwhile: Meanwhile | None = None,
        *,
        kind: str = "exchange",
    ) -> Tensor:
        """Sends rows to their ranks.

        Args:
            rows_SC: Rows, those for rank 0 first.
            send: Rows for each rank; they sum to S.
            recv: Rows from each rank; they sum to R.
            meanwhile: Local work to do while rows travel.
            kind: What it counts as.

        Returns:
            The received rows ``[R, C]``, those from rank 0 first.
        """
        rows_sent = sum(send) - send[self.rank]
        if self._shared and self._shared.holds(rows_SC):
            with self._timed(kind, rows_SC, rows_sent):
                return self._shared.exchange(rows_SC, send, recv, meanwhile)
        received_RC = rows_SC.new_empty((sum(recv), rows_SC.shape[1]))
        with self._timed(kind, rows_SC, rows_sent):
            sent_SC = rows_SC.contiguous()
            start = partial(dist.all_to_all_single, received_RC, sent_SC, list(recv), list(send))
            self._run(start, meanwhile)
        return received_RC

    def gather(
        self, rows_TC: Tensor, counts: Sequence[int], meanwhile: Meanwhile | None = None
    ) -> Tensor:
        """Gives every rank the rows of all ``[R, C]``, of which each has ``counts[rank]``."""
        num_rows = counts[self.rank]
        if self._shared and self._shared.holds(rows_TC):
            with self._timed("gather", rows_TC, (self.size - 1) * num_rows):
                return self._shared.gather(rows_TC, counts, meanwhile)
        if self._only_exchanges:
            rows_RC = rows_TC.repeat(self.size, 1)
            sizes = [num_rows] * self.size
            return self.exchange(rows_RC, sizes, counts, meanwhile, kind="gather")
        most = max(counts)
        gathered_RC = rows_TC.new_empty((self.size * most, rows_TC.shape[1]))
        with self._timed("gather", gathered_RC, (self.size - 1) * most):
            start = partial(dist.all_gather_into_tensor, gathered_RC, _pad(rows_TC, most))
            self._run(start, meanwhile)
        if min(counts) == most:
            return gathered_RC
        blocks_WMC = gathered_RC.view(self.size, most, -1)
        return torch.cat([block[:count] for block, count in zip(blocks_WMC, counts, strict=True)])

    def reduce(
        self, partial_RC: Tensor, counts: Sequence[int], meanwhile: Meanwhile | None = None
    ) -> Tensor:
        """Sums what all ranks have for the rows of this one ``[T, C]``, from ``[R, C]`` each."""
        num_rows, width = counts[self.rank], partial_RC.shape[1]
        if self._shared and self._shared.holds(partial_RC):
            with self._timed("reduce", partial_RC, sum(counts) - num_rows):
                return self._shared.reduce(partial_RC, counts, meanwhile)
        if self._only_exchanges:
            sizes = [num_rows] * self.size
            received_RC = self.exchange(partial_RC, counts, sizes, meanwhile, kind="reduce")
            blocks_WTC = received_RC.view(self.size, num_rows, width)
            return blocks_WTC.sum(dim=0, dtype=_sum_dtype(partial_RC)).to(partial_RC.dtype)
        most = max(counts)
        if min(counts) != most:
            partial_RC = torch.cat([_pad(b, most) for b in partial_RC.split(list(counts))])
        sum_MC = partial_RC.new_empty((most, width))
        with self._timed("reduce", sum_MC, (self.size - 1) * most):
            start = partial(dist.reduce_scatter_tensor, sum_MC, partial_RC.contiguous())
            self._run(start, meanwhile)
        return sum_MC[:num_rows]

    def sum(self, partial_TC: Tensor, meanwhile: Meanwhile | None = None) -> Tensor:
        """Sums tensors of one shape over all ranks, bit for bit the same everywhere."""
        num_rows = partial_TC.shape[0]
        if not self._only_exchanges:
            sum_TC = partial_TC.contiguous().clone()
            # As many bytes as a ring sends of it.
            with self._timed("sum", sum_TC, 2 * num_rows * (self.size - 1) // self.size):
                self._run(partial(dist.all_reduce, sum_TC), meanwhile)
            return sum_TC
        is_small = partial_TC.nbytes <= _ONE_SHOT_SHARED_BYTES
        if self._shared and is_small and self._shared.holds(partial_TC):
            with self._timed("sum", partial_TC, (self.size - 1) * num_rows):
                return self._shared.sum(partial_TC, meanwhile)
        if partial_TC.nbytes <= _ONE_SHOT_BYTES:
            blocks_WTC = self.gather(partial_TC, [num_rows] * self.size, meanwhile)
            blocks_WTC = blocks_WTC.view(self.size, *partial_TC.shape)
            return blocks_WTC.sum(dim=0, dtype=_sum_dtype(partial_TC)).to(partial_TC.dtype)
        borders = [num_rows * rank // self.size for rank in range(self.size + 1)]
        shares = [end - start for start, end in zip(borders, borders[1:], strict=False)]
        return self.gather(self.reduce(partial_TC, shares, meanwhile), shares)

    def _to_host(self, rows: Tensor) -> Tensor:
        """Copies rows for which a GPU waits, and does not wait for it without a bound."""
        if not rows.is_cuda:
            return rows
        copied = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        copied.copy_(rows, non_blocking=True)
        not_done = "a message of all ranks was not there"
        wait_within(now(rows.device), patience_of(self.group), not_done)
        return copied

    def _run(self, start: Callable[..., dist.Work | None], meanwhile: Meanwhile | None) -> None:
        """Runs a collective, and something else while it is on its way."""
        work = start(group=self.group, async_op=meanwhile is not None)
        if meanwhile is not None:
            meanwhile()
            if work is not None:
                work.wait()  # on a GPU the stream waits, not the host

    def _timed(self, kind: str, rows: Tensor, rows_sent: int) -> AbstractContextManager[None]:
        num_bytes = rows_sent * rows.shape[1] * rows.element_size()
        return self.stats.timed(kind, rows.device, num_bytes)


def _pad(rows_TC: Tensor, num_rows: int) -> Tensor:
    if rows_TC.shape[0] == num_rows:
        return rows_TC.contiguous()
    padded_MC = rows_TC.new_zeros((num_rows, rows_TC.shape[1]))
    padded_MC[: rows_TC.shape[0]] = rows_TC
    return padded_MC


def _sum_dtype(rows: Tensor) -> torch.dtype:
    return torch.promote_types(rows.dtype, torch.float32)
