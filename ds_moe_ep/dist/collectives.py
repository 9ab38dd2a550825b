"""Differentiable row exchange between the ranks of an expert group, timed and counted.

It owns how rows travel. It does not decide which rows go where: that is a dispatcher's business
(``ds_moe_ep.moe``).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["CommStats", "Communicator"]

# Every tensor of a packed row starts at a multiple of this many bytes, so that a received row can
# be viewed in place.
_ALIGNMENT_BYTES = 16


@dataclass
class CommStats:
    """What the collectives of one rank cost so far.

    Attributes:
        calls: Number of collectives started.
        sent_bytes: Bytes that left this rank for another one (rows that stay here are not counted).
    """

    calls: int = 0
    sent_bytes: int = 0
    _seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def timed(self, device: torch.device, sent_bytes: int) -> Iterator[None]:
        """Times one collective: by the clock on a CPU, by events without a sync on a GPU."""
        self.calls += 1
        self.sent_bytes += sent_bytes
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start
        elif torch.cuda.is_current_stream_capturing():
            yield  # a captured collective has no time of its own
        else:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))

    def seconds(self) -> float:
        """Seconds in collectives so far, waiting for slower ranks included; synchronises a GPU."""
        if self._events:
            self._events[-1][1].synchronize()
            self._seconds += sum(begin.elapsed_time(end) for begin, end in self._events) / 1e3
            self._events.clear()
        return self._seconds


class Communicator:
    """The collectives of one expert group.

    Args:
        group: The process group, or None for a group of one, where nothing travels.
        stats: Where costs are counted; by default in a record of its own.
    """

    def __init__(self, group: dist.ProcessGroup | None, stats: CommStats | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1
        self.stats = CommStats() if stats is None else stats

    def exchange_counts(self, send_counts_W: Tensor) -> tuple[list[int], list[int]]:
        """Tells every rank how many rows it will get from this one.

        Args:
            send_counts_W: int64 ``[size]``, rows for each rank of the group, on the device of the
                rows.

        Returns:
            Rows to send to and to receive from each rank, as host integers (a device-to-host sync
            on a GPU).
        """
        if self.size == 1:
            counts = send_counts_W.tolist()
            return counts, counts
        recv_counts_W = torch.empty_like(send_counts_W)
        with self.stats.timed(send_counts_W.device, send_counts_W.element_size() * (self.size - 1)):
            dist.all_to_all_single(recv_counts_W, send_counts_W, group=self.group)
        send, recv = torch.stack((send_counts_W, recv_counts_W)).tolist()
        return send, recv

    def exchange_rows(
        self, tensors: Sequence[Tensor], send_counts: Sequence[int], recv_counts: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Sends rows to their ranks in one message each; gradients travel back the same way.

        Args:
            tensors: Tensors ``[S, C_i]`` that belong together row by row, rows for rank 0 first.
                Dtypes may differ.
            send_counts: Rows for each rank; they sum to S.
            recv_counts: Rows from each rank; they sum to R.

        Returns:
            The received tensors ``[R, C_i]``, rows from rank 0 first, with the dtypes of the input.
        """
        if self.size == 1:
            return tuple(tensors)
        return _ExchangeRows.apply(self, list(send_counts), list(recv_counts), *tensors)

    def _exchange(
        self, tensors: Sequence[Tensor], send: list[int], recv: list[int]
    ) -> tuple[Tensor, ...]:
        layout = _RowLayout(tensors)
        packed_SB = layout.pack(tensors)
        received_RB = packed_SB.new_empty((sum(recv), packed_SB.shape[1]))
        leaving = sum(send) - send[self.rank]
        with self.stats.timed(
            packed_SB.device, leaving * packed_SB.shape[1] * packed_SB.element_size()
        ):
            dist.all_to_all_single(received_RB, packed_SB, recv, send, group=self.group)
        return layout.unpack(received_RB)


class _RowLayout:
    """Where each tensor lies in a packed row of bytes. One tensor alone is sent as it is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
        self.offsets = [0]
        for width in self.widths:
            self.offsets.append(
                -(-(self.offsets[-1] + width) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            )

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0].contiguous()
        rows = tensors[0].new_empty((tensors[0].shape[0], self.offsets[-1]), dtype=torch.uint8)
        for part, tensor in zip(self._parts(rows), tensors, strict=True):
            part.copy_(tensor)
        return rows

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        return (rows,) if len(self.dtypes) == 1 else tuple(self._parts(rows))

    def _parts(self, rows: Tensor) -> list[Tensor]:
        return [
            rows[:, offset : offset + width].view(dtype)
            for offset, width, dtype in zip(self.offsets, self.widths, self.dtypes, strict=False)
        ]


class _ExchangeRows(torch.autograd.Function):
    """The exchange, with a backward that returns the gradients in one message too."""

    @staticmethod
    def forward(ctx, comm, send_counts, recv_counts, *tensors):
        ctx.comm, ctx.send_counts, ctx.recv_counts = comm, send_counts, recv_counts
        received = comm._exchange(tensors, send_counts, recv_counts)
        ctx.mark_non_differentiable(*(t for t in received if not t.is_floating_point()))
        return received

    @staticmethod
    def backward(ctx, *grads):
        # Integer outputs get no gradient; the others arrive as zeros where nothing depends on them,
        # on every rank alike.
        floating = [
            i for i, grad in enumerate(grads) if grad is not None and grad.is_floating_point()
        ]
        returned = ctx.comm._exchange(
            [grads[i] for i in floating], ctx.recv_counts, ctx.send_counts
        )
        result: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(floating, returned, strict=True):
            result[i] = grad
        return None, None, None, *result
