"""Rows between ranks on one host through memory that they share, for tensors on the CPU.

gloo sends even a few bytes through sockets and threads of its own: milliseconds, where eight ranks
share a few cores. Here a rank writes its rows once, and all others read them there; many rows
slot by slot. Which rows, and what for, is the communicator's business.
"""

# Shapes: W ranks of the group, T rows of this rank, R rows of all, C columns

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.dist.meeting import LINE_BYTES, WORD_BYTES, Meeting, whole_lines

__all__ = ["SharedMemory"]

_FOLDER = "/dev/shm"

# Words at the head of a slot: how many rows its rank sends, and the first of those for each rank.
_NUM_ROWS, _STARTS = 0, 1


class SharedMemory:
    """A place for each rank of a group to write what the others read.

    A rank has two slots and uses them in turn: when it writes into one again, every rank has begun
    the exchange in between, and so has read what was there. So an exchange waits just once, or
    once for each slot that its rows fill, and what it is given to do meanwhile is done before.

    Args:
        memory: Mapped by all ranks.
        rank: This rank in the group.
        size: Its ranks.
        slot_bytes: What a slot holds beside its words.
        timeout_s: How long to wait for the other ranks.
    """

    def __init__(
        self, memory: mmap.mmap, *, rank: int, size: int, slot_bytes: int, timeout_s: float
    ) -> None:
        self.rank, self.size, self.slot_bytes = rank, size, slot_bytes
        self._meeting = Meeting(memory, rank=rank, size=size, timeout_s=timeout_s)
        self._words = memoryview(memory).cast("q")
        self._elements = {torch.uint8: torch.frombuffer(memory, dtype=torch.uint8)}
        # Both slots of rank 0, then of rank 1; and for each turn the first word of every rank's.
        self._first_slot = Meeting.num_bytes(size)
        self._slot_step = _head_bytes(size) + slot_bytes
        words = [(self._first_slot + i * self._slot_step) // WORD_BYTES for i in range(2 * size)]
        self._heads = words[::2], words[1::2]
        self._exchanges = 0

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, *, total_bytes: int, timeout_s: float
    ) -> SharedMemory | None:
        """Maps memory for a group of ranks on one host; all of them call it.

        Args:
            group: A gloo group.
            total_bytes: What to reserve for all slots together.
            timeout_s: How long a rank waits for the others.

        Returns:
            None, on all ranks alike, where it cannot be had.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        slot_bytes = total_bytes // (2 * size) // LINE_BYTES * LINE_BYTES
        file_bytes = Meeting.num_bytes(size) + 2 * size * (_head_bytes(size) + slot_bytes)
        path = _create(file_bytes) if rank == 0 else ""
        try:
            told: list = [path]
            dist.broadcast_object_list(told, group=group, group_src=0)
            memory = _map(told[0], file_bytes) if told[0] else None
            if memory is not None and rank == 0:
                Meeting.prepare(memory, size)
            mapped: list = [None] * size
            dist.all_gather_object(mapped, memory is not None, group=group)
        finally:
            if path:
                os.unlink(path)  # it lives on until the last rank ends, and no longer
        if memory is None or not all(mapped):
            return None
        return cls(memory, rank=rank, size=size, slot_bytes=slot_bytes, timeout_s=timeout_s)

    def holds(self, rows: Tensor) -> bool:
        """Returns whether rows like these can go by it: those of other ranks are as wide."""
        return self._rows_at_once(rows) > 0

    def exchange(
        self,
        rows_SC: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sends rows to their ranks, as ``Communicator.exchange_rows`` does."""
        most = self._rows_at_once(rows_SC)
        starts = [sum(send[:rank]) for rank in range(self.size)]
        self._publish(rows_SC[:most], [rows_SC.shape[0], *starts], meanwhile=meanwhile)
        heads = self._heads[self._turn]
        first = [self._words[head + _STARTS + self.rank] for head in heads]
        num_rows = max(self._words[head + _NUM_ROWS] for head in heads)
        received_RC = rows_SC.new_empty((sum(recv), rows_SC.shape[1]))
        parts = received_RC.split(list(recv))
        for begin in range(0, max(1, num_rows), most):
            if begin:
                self._publish(rows_SC[begin : begin + most])
            for rank, part in enumerate(parts):
                here = slice(max(0, begin - first[rank]), max(0, begin + most - first[rank]))
                if (rows := part[here]).shape[0]:
                    start = first[rank] + here.start - begin
                    rows.copy_(self._rows(rows, rows.shape[0], start)[rank])
        return received_RC

    def gather(
        self,
        rows_TC: Tensor,
        counts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Gives every rank the rows of all."""
        most, longest = self._rows_at_once(rows_TC), max(counts)
        if longest <= most:
            self._publish(rows_TC, meanwhile=meanwhile)
            rows_WTC = self._rows(rows_TC, longest)
            if min(counts) == longest:
                return rows_WTC.clone(memory_format=torch.contiguous_format).flatten(0, 1)
            return torch.cat([rows_WTC[rank, :count] for rank, count in enumerate(counts)])
        gathered_RC = rows_TC.new_empty((sum(counts), rows_TC.shape[1]))
        parts = gathered_RC.split(list(counts))
        for begin in range(0, longest, most):
            self._publish(rows_TC[begin : begin + most], meanwhile=None if begin else meanwhile)
            rows_WTC = self._rows(rows_TC, min(most, longest - begin))
            for part, rows_TC_there in zip(parts, rows_WTC, strict=True):
                rows = part[begin : begin + most]
                rows.copy_(rows_TC_there[: rows.shape[0]])
        return gathered_RC

    def reduce(
        self,
        partial_RC: Tensor,
        counts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """Sums what all ranks have for the rows of this one."""
        own = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))
        return self._sum(partial_RC, own, meanwhile)

    def sum(self, partial_TC: Tensor, meanwhile: Callable[[], None] | None = None) -> Tensor:
        """Sums what all ranks have, bit for bit the same everywhere."""
        return self._sum(partial_TC, slice(0, partial_TC.shape[0]), meanwhile)

    def _sum(self, partial_RC: Tensor, own: slice, meanwhile: Callable[[], None] | None) -> Tensor:
        most, dtype = self._rows_at_once(partial_RC), partial_RC.dtype
        sums = []
        for begin in range(0, max(1, partial_RC.shape[0]), most):
            rows_RC = partial_RC[begin : begin + most]
            self._publish(rows_RC, meanwhile=None if begin else meanwhile)
            start, stop = max(own.start, begin), min(own.stop, begin + most)
            if start < stop:
                rows_WTC = self._rows(partial_RC, stop - start, start - begin)
                sum_TC = rows_WTC.sum(dim=0, dtype=torch.promote_types(dtype, torch.float32))
                sums.append(sum_TC.to(dtype))
        if not sums:
            return partial_RC.new_empty((0, partial_RC.shape[1]))
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _rows_at_once(self, rows: Tensor) -> int:
        """Returns how many such rows a slot holds, the same on all ranks."""
        return self.slot_bytes // max(1, rows.shape[1] * rows.element_size())

    def _publish(
        self,
        rows_TC: Tensor,
        words: Sequence[int] = (),
        *,
        meanwhile: Callable[[], None] | None = None,
    ) -> None:
        """Writes this rank's rows, and words at the head of its slot, and waits for all ranks."""
        self._exchanges += 1
        head = self._heads[self._turn][self.rank]
        for place, word in enumerate(words, start=head):
            self._words[place] = word
        self._rows(rows_TC, rows_TC.shape[0])[self.rank].copy_(rows_TC)
        self._meeting.come()
        if meanwhile is not None:
            meanwhile()
        self._meeting.wait()

    @property
    def _turn(self) -> int:
        return self._exchanges % 2

    def _rows(self, like: Tensor, num_rows: int, start: int = 0) -> Tensor:
        """Returns a view of rows in all ranks' slots, from row `start` of each, ``[W, T, C]``.

        One operation, as a small exchange costs about what its operations do.
        """
        dtype, width = like.dtype, like.shape[1]
        if dtype not in self._elements:
            with torch.inference_mode(False):  # later exchanges may be in another mode
                self._elements[dtype] = self._elements[torch.uint8].view(dtype)
        first = self._first_slot + self._turn * self._slot_step + _head_bytes(self.size)
        return self._elements[dtype].as_strided(
            (self.size, num_rows, width),
            (2 * self._slot_step // dtype.itemsize, width, 1),
            first // dtype.itemsize + start * width,
        )


def _head_bytes(size: int) -> int:
    """The bytes of a slot's words."""
    return whole_lines(WORD_BYTES * (_STARTS + size))


def _create(num_bytes: int) -> str:
    """Makes a file in memory and returns its path, or nothing where there is no room for it."""
    try:
        descriptor, path = tempfile.mkstemp(prefix="ds_moe_ep-", dir=_FOLDER)
    except OSError:
        return ""
    try:
        os.posix_fallocate(descriptor, 0, num_bytes)  # now, rather than a SIGBUS later
    except OSError:
        os.unlink(path)
        return ""
    finally:
        os.close(descriptor)
    return path


def _map(path: str, num_bytes: int) -> mmap.mmap | None:
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:  # another host, or another container on it
        return None
    try:
        return mmap.mmap(descriptor, num_bytes)
    finally:
        os.close(descriptor)
