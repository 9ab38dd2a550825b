"""Differentiable collectives over rows between the ranks of an expert group.

How the rows travel is the transport's business, which rows go where a dispatcher's
(``ds_moe_ep.moe``).
"""

# Shapes: W ranks of the group, T rows of this rank, S rows sent, R rows received, C columns

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ds_moe_ep.dist.row_layout import RowLayout
from ds_moe_ep.dist.transport import Meanwhile, Transport

__all__ = ["Communicator", "Meanwhile"]


class Communicator(Transport):
    """The collectives of one expert group, each with its backward.

    Without gradients they do without autograd's own steps, which cost like those of a small
    collective.
    """

    def exchange_rows(
        self,
        tensors: Sequence[Tensor],
        send_counts: Sequence[int],
        recv_counts: Sequence[int],
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, ...]:
        """Sends rows to their ranks in one message each; gradients travel back the same way.

        Args:
            tensors: Tensors ``[S, C_i]`` that belong together row by row, rows for rank 0 first.
                Dtypes may differ.
            send_counts: Rows for each rank; they sum to S.
            recv_counts: Rows from each rank; they sum to R.
            meanwhile: Local work to do while rows travel.

        Returns:
            The received tensors ``[R, C_i]``, rows from rank 0 first, with the dtypes of the input.
        """
        local_work = self._local_work(meanwhile, tensors[0])
        if self.size == 1:
            return tuple(tensors)
        exchange = _ExchangeRows.apply if torch.is_grad_enabled() else _exchange
        return exchange(self, list(send_counts), list(recv_counts), local_work, *tensors)

    def gather_rows(
        self,
        tensors: Sequence[Tensor],
        counts: Sequence[int],
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, ...]:
        """Gives every rank the rows of all, in one message; the gradients of all come back summed.

        Args:
            tensors: Tensors ``[T, C_i]`` that belong together row by row. Dtypes may differ.
            counts: Rows of each rank; they sum to R.
            meanwhile: See `exchange_rows`.

        Returns:
            The tensors ``[R, C_i]``, rows of rank 0 first, with the dtypes of the input.
        """
        local_work = self._local_work(meanwhile, tensors[0])
        if self.size == 1:
            return tuple(tensors)
        gather = _GatherRows.apply if torch.is_grad_enabled() else _gather
        return gather(self, list(counts), local_work, *tensors)

    def reduce_rows(self, partial_RC: Tensor, counts: Sequence[int]) -> Tensor:
        """Sums what all ranks have for the rows of this one; gradients go to all ranks.

        Args:
            partial_RC: This rank's share of every rank's rows, those of rank 0 first.
            counts: Rows of each rank; they sum to R.

        Returns:
            The sums ``[T, C]``.
        """
        if self.size == 1:
            return partial_RC
        if not torch.is_grad_enabled():
            return self.reduce(partial_RC, counts)
        return _ReduceRows.apply(self, list(counts), partial_RC)

    def sum_over_ranks(self, partial_TC: Tensor, meanwhile: Meanwhile | None = None) -> Tensor:
        """Sums tensors of one shape over all ranks, bit for bit the same everywhere.

        The gradient of the sum is the same on all ranks, and passes through. For `meanwhile` see
        `exchange_rows`.
        """
        local_work = self._local_work(meanwhile, partial_TC)
        if self.size == 1:
            return partial_TC
        if not torch.is_grad_enabled():
            return self.sum(partial_TC, local_work)
        return _SumOverRanks.apply(self, local_work, partial_TC)

    def same_on_all_ranks(self, tensor_TC: Tensor) -> Tensor:
        """Returns a tensor that is the same on all ranks, and sums its gradients over them."""
        if self.size == 1 or not torch.is_grad_enabled():
            return tensor_TC
        return _SameOnAllRanks.apply(self, tensor_TC)

    def _local_work(self, meanwhile: Meanwhile | None, rows: Tensor) -> Meanwhile | None:
        """Returns what does the work as if it were done here, outside of any collective.

        In a group of one, where nothing travels, it does it at once.
        """
        if meanwhile is None:
            return None
        if self.size == 1:
            meanwhile()
            return None
        records_gradients = torch.is_grad_enabled()  # an autograd function's forward does not

        def work() -> None:
            with self.stats.untimed(rows.device), torch.set_grad_enabled(records_gradients):
                meanwhile()

        return work


def _exchange(comm, send_counts, recv_counts, meanwhile, *tensors):
    layout = RowLayout(tensors)
    return layout.unpack(comm.exchange(layout.pack(tensors), send_counts, recv_counts, meanwhile))


def _gather(comm, counts, meanwhile, *tensors):
    layout = RowLayout(tensors)
    return layout.unpack(comm.gather(layout.pack(tensors), counts, meanwhile))


class _ExchangeRows(torch.autograd.Function):
    """The exchange, with a backward that returns the gradients in one message too."""

    @staticmethod
    def forward(ctx, comm, send_counts, recv_counts, meanwhile, *tensors):
        ctx.comm, ctx.send_counts, ctx.recv_counts = comm, send_counts, recv_counts
        received = _exchange(comm, send_counts, recv_counts, meanwhile, *tensors)
        ctx.mark_non_differentiable(*(t for t in received if not t.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx, *grads):
        floating = _floating(grads)
        sent = [grads[i] for i in floating]
        back = _exchange(ctx.comm, ctx.recv_counts, ctx.send_counts, None, *sent)
        result: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(floating, back, strict=True):
            result[i] = grad
        return None, None, None, None, *result


class _GatherRows(torch.autograd.Function):
    """The gathering; its backward is the reduction."""

    @staticmethod
    def forward(ctx, comm, counts, meanwhile, *tensors):
        ctx.comm, ctx.counts = comm, counts
        gathered = _gather(comm, counts, meanwhile, *tensors)
        ctx.mark_non_differentiable(*(t for t in gathered if not t.is_floating_point()))
        return gathered

    @staticmethod
    def backward(ctx, *grads):
        result: list[Tensor | None] = [None] * len(grads)
        for i in _floating(grads):
            result[i] = ctx.comm.reduce(grads[i], ctx.counts)
        return None, None, None, *result


class _ReduceRows(torch.autograd.Function):
    """The reduction; its backward is the gathering."""

    @staticmethod
    def forward(ctx, comm, counts, partial_RC):
        ctx.comm, ctx.counts = comm, counts
        return comm.reduce(partial_RC, counts)

    @staticmethod
    def backward(ctx, grad_TC):
        return None, None, ctx.comm.gather(grad_TC, ctx.counts)


class _SumOverRanks(torch.autograd.Function):
    """The sum of a replicated computation; its gradient is replicated too."""

    @staticmethod
    def forward(ctx, comm, meanwhile, partial_TC):
        return comm.sum(partial_TC, meanwhile)

    @staticmethod
    def backward(ctx, grad_TC):
        return None, None, grad_TC


class _SameOnAllRanks(torch.autograd.Function):
    """The conjugate of the sum: nothing forward, the sum of all ranks' gradients backward."""

    @staticmethod
    def forward(ctx, comm, tensor_TC):
        ctx.comm = comm
        return tensor_TC.view_as(tensor_TC)

    @staticmethod
    def backward(ctx, grad_TC):
        return None, ctx.comm.sum(grad_TC)


def _floating(grads: Sequence[Tensor | None]) -> list[int]:
    """Lists the outputs that get a gradient: integers do not.

    The others arrive as zeros where nothing depends on them, on every rank alike.
    """
    return [i for i, grad in enumerate(grads) if grad is not None and grad.is_floating_point()]
