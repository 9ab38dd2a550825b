"""Rows between ranks on one host through memory that they share, for tensors on the CPU.

gloo sends even a few bytes through sockets and threads of its own: milliseconds, where eight ranks
share a few cores. Here a rank writes its rows once, and all others read them there. Which rows, and
what for, is the communicator's business; it also has gloo for what does not fit.
"""

# Shapes: W ranks of the group, T rows of this rank, R rows of all, C columns

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.errors import DistributedError

__all__ = ["SharedMemory"]

_FOLDER = "/dev/shm"
_CACHE_LINE_BYTES = 64
_TOO_LARGE = -1

# How often a rank that waits looks before it sleeps. To be woken takes longer than most waits, but
# with more ranks than cores the one it waits for may need this one's.
_LOOKS = 200

_LIBC = ctypes.CDLL(None, use_errno=True)
# By the clock that nobody sets; glibc has it since 2.30. By the other one, to set the clock while a
# rank waits ends its wait at once, or never.
_CAN_WAIT_MONOTONIC = hasattr(_LIBC, "sem_clockwait")


class SharedMemory:
    """A place for each rank of a group to write what the others read.

    A rank has two slots and uses them in turn: when it writes into one again, every rank has begun
    the exchange in between, and so has read what was there. So an exchange waits just once, and
    what it is given to do meanwhile is done before. The waiting is done on semaphores in the same
    memory, one for each pair of ranks.

    Args:
        memory: Mapped by all ranks.
        rank: This rank in the group.
        size: Its ranks.
        slot_bytes: What a slot holds beside the places of its parts.
        timeout_s: How long to wait for another rank.
    """

    def __init__(
        self, memory: mmap.mmap, *, rank: int, size: int, slot_bytes: int, timeout_s: float
    ) -> None:
        self.rank, self.size, self.slot_bytes = rank, size, slot_bytes
        self._timeout_s = timeout_s
        self._words = memoryview(memory).cast("q")  # the semaphores, then the slots
        # Of each turn: where the header of every rank's slot is in the words, and the rows of all
        # slots as bytes [W, B].
        self._headers: list[list[int]] = []
        self._slots_WB: list[Tensor] = []
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        first, header_bytes = _semaphores_bytes(size), _header_bytes(size)
        step = header_bytes + slot_bytes
        for turn in range(2):
            self._headers.append([(first + (2 * r + turn) * step) // 8 for r in range(size)])
            slots_WB = everything[first:].view(size, 2, step)[:, turn, header_bytes:]
            self._slots_WB.append(slots_WB)
        self._turn = 0
        self._looks = _LOOKS if size <= len(os.sched_getaffinity(0)) else 0
        others = [other for other in range(size) if other != rank]
        first = everything.data_ptr()
        self._to_others = [_semaphore(first, rank, other, size) for other in others]
        self._from_others = [(other, _semaphore(first, other, rank, size)) for other in others]

    @classmethod
    def open(
        cls, group: dist.ProcessGroup, *, total_bytes: int, timeout_s: float
    ) -> SharedMemory | None:
        """Maps memory for a group of ranks on one host; all of them call it.

        Args:
            group: A gloo group.
            total_bytes: What to reserve for all slots together.
            timeout_s: How long a rank waits for another.

        Returns:
            None, on all ranks alike, where it cannot be had.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        slot_bytes = total_bytes // (2 * size) // _CACHE_LINE_BYTES * _CACHE_LINE_BYTES
        file_bytes = _semaphores_bytes(size) + 2 * size * (_header_bytes(size) + slot_bytes)
        path = _create(file_bytes) if rank == 0 else ""
        told: list = [path]
        dist.broadcast_object_list(told, group=group, group_src=0)
        memory = _map(told[0], file_bytes) if told[0] else None
        if memory is not None and rank == 0:
            _start_semaphores(memory, size)
        mapped: list = [None] * size
        dist.all_gather_object(mapped, memory is not None, group=group)
        if path:
            os.unlink(path)  # it lives on until the last rank ends, and no longer
        if memory is None or not all(mapped):
            return None
        return cls(memory, rank=rank, size=size, slot_bytes=slot_bytes, timeout_s=timeout_s)

    def exchange(
        self,
        rows_SC: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Sends rows to their ranks, as ``Communicator.exchange_rows`` does.

        Returns:
            None, on all ranks alike, if some rank's rows do not fit its slot. So do the others.
        """
        row_bytes = rows_SC.shape[1] * rows_SC.element_size()
        starts = [row_bytes * sum(send[:rank]) for rank in range(self.size)]
        if not self._publish(rows_SC, starts, meanwhile=meanwhile):
            return None
        received_RC = rows_SC.new_empty((sum(recv), rows_SC.shape[1]))
        for rank, part in enumerate(received_RC.split(list(recv))):
            if part.shape[0]:
                start = self._words[self._headers[self._turn][rank] + 1 + self.rank]
                part.copy_(self._read(rank, part, start))
        return received_RC

    def gather(
        self,
        rows_TC: Tensor,
        counts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Gives every rank the rows of all."""
        if not self._publish(rows_TC, meanwhile=meanwhile):
            return None
        gathered_RC = rows_TC.new_empty((sum(counts), rows_TC.shape[1]))
        if min(counts) == max(counts):
            gathered_RC.view(self.size, -1).copy_(self._read_all(rows_TC))
            return gathered_RC
        for rank, part in enumerate(gathered_RC.split(list(counts))):
            part.copy_(self._read(rank, part))
        return gathered_RC

    def reduce(
        self,
        partial_RC: Tensor,
        counts: Sequence[int],
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor | None:
        """Sums what all ranks have for the rows of this one."""
        if not self._publish(partial_RC, meanwhile=meanwhile):
            return None
        num_rows, width = counts[self.rank], partial_RC.shape[1]
        own_TC = partial_RC[:num_rows]
        start = sum(counts[: self.rank]) * width * partial_RC.element_size()
        sum_dtype = torch.promote_types(partial_RC.dtype, torch.float32)
        sum_TC = self._read_all(own_TC, start).sum(dim=0, dtype=sum_dtype)
        return sum_TC.to(partial_RC.dtype).view(num_rows, width)

    def _publish(
        self,
        rows: Tensor,
        starts: Sequence[int] = (),
        *,
        meanwhile: Callable[[], None] | None = None,
    ) -> bool:
        """Writes this rank's rows, and where those for each rank start, and waits for all ranks.

        Returns:
            Whether the rows of all have fitted.
        """
        self._turn = 1 - self._turn
        headers = self._headers[self._turn]
        num_bytes = rows.numel() * rows.element_size()
        fits = num_bytes <= self.slot_bytes
        header = headers[self.rank]
        self._words[header] = num_bytes if fits else _TOO_LARGE
        if fits:
            for place, start in enumerate(starts, start=header + 1):
                self._words[place] = start
            if num_bytes:
                self._read(self.rank, rows).copy_(rows)
        for semaphore in self._to_others:
            _LIBC.sem_post(semaphore)
        if meanwhile is not None:
            meanwhile()
        for rank, semaphore in self._from_others:
            self._wait(rank, semaphore)
        return all(self._words[header] != _TOO_LARGE for header in headers)

    def _wait(self, rank: int, semaphore: ctypes.c_void_p) -> None:
        for _ in range(self._looks):
            if _LIBC.sem_trywait(semaphore) == 0:
                return
            os.sched_yield()
        now_s = time.monotonic() if _CAN_WAIT_MONOTONIC else time.time()
        until_s = now_s + self._timeout_s
        deadline = ctypes.byref(_TimeSpec(int(until_s), int(until_s % 1 * 1e9)))
        while _sleep_until(semaphore, deadline) != 0:
            if ctypes.get_errno() == errno.ETIMEDOUT:
                raise DistributedError(
                    f"rank {rank} of {self.size} on {os.uname().nodename} did not come to an "
                    f"exchange of rows within {self._timeout_s:g} s: it hangs, has ended, or is "
                    "much slower than this one."
                )

    def _read(self, rank: int, like: Tensor, start: int = 0) -> Tensor:
        """Returns a view of a slot's rows, from byte `start` on, like another tensor."""
        num_bytes = like.numel() * like.element_size()
        part_B = self._slots_WB[self._turn][rank, start : start + num_bytes]
        return part_B.view(like.dtype).view(like.shape)

    def _read_all(self, like: Tensor, start: int = 0) -> Tensor:
        """Returns the same of every rank's slot, each as one line."""
        num_bytes = like.numel() * like.element_size()
        return self._slots_WB[self._turn][:, start : start + num_bytes].view(like.dtype)


def _sleep_until(semaphore: ctypes.c_void_p, deadline: object) -> int:
    if _CAN_WAIT_MONOTONIC:
        return _LIBC.sem_clockwait(semaphore, time.CLOCK_MONOTONIC, deadline)
    return _LIBC.sem_timedwait(semaphore, deadline)


class _TimeSpec(ctypes.Structure):
    """C's struct timespec, where a long is 64 bits."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


def _semaphores_bytes(size: int) -> int:
    return size * size * _CACHE_LINE_BYTES


def _semaphore(first: int, sender: int, receiver: int, size: int) -> ctypes.c_void_p:
    """Returns the address of what a receiver waits on for a sender."""
    return ctypes.c_void_p(first + (sender * size + receiver) * _CACHE_LINE_BYTES)


def _start_semaphores(memory: mmap.mmap, size: int) -> None:
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for sender in range(size):
        for receiver in range(size):
            _LIBC.sem_init(_semaphore(first, sender, receiver, size), 1, 0)


def _header_bytes(size: int) -> int:
    """A slot's bytes, or that they do not fit, and where the part for each rank starts."""
    return -(-8 * (1 + size) // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


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
