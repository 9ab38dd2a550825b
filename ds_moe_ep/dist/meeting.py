"""Where the ranks of one host wait until all have come, on semaphores in memory that they share.

It brings ranks together and orders what they write and read; which that is, is their business.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time

from ds_moe_ep.errors import DistributedError

__all__ = ["LINE_BYTES", "WORD_BYTES", "Meeting", "whole_lines"]

LINE_BYTES = 64  # of a cache, so that no two semaphores are in one
WORD_BYTES = 8

# How often a rank that waits looks, and lets others run, before it sleeps: some milliseconds with a
# core for each rank, as to be woken takes longer than most waits. With fewer cores a few looks are
# enough for the ranks to take turns on one; more only use it up.
_LOOKS, _LOOKS_ON_FEW_CORES = 2000, 20

_LIBC = ctypes.CDLL(None, use_errno=True)
# By the clock that nobody sets; glibc has it since 2.30. By the other one, to set the clock while a
# rank waits ends its wait at once, or never.
_CAN_WAIT_MONOTONIC = hasattr(_LIBC, "sem_clockwait")


class Meeting:
    """Lets the ranks of a group meet, again and again: each comes, and then waits for all.

    Ranks count themselves under a lock, and the last to come opens the gate of every rank: however
    many they are, each is woken once. To post a semaphore makes what was written before visible to
    who has waited for it. So, from holder to holder of the lock, the last sees what all have
    written, and so does whoever passes a gate that the last has opened.

    Args:
        memory: Mapped by all ranks, and prepared. Its first `num_bytes` are used here.
        rank: This rank in the group.
        size: Its ranks.
        timeout_s: How long to wait for the others.
    """

    def __init__(self, memory: mmap.mmap, *, rank: int, size: int, timeout_s: float) -> None:
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        has_core_each = size <= len(os.sched_getaffinity(0))
        self._looks = _LOOKS if has_core_each else _LOOKS_ON_FEW_CORES
        self._lock, *self._gates = _semaphores(memory, size)
        self._meetings = 0
        # How many ranks have come, then to how many meetings each has, for messages.
        first = (1 + size) * LINE_BYTES
        self._words = memoryview(memory)[first : first + (1 + size) * WORD_BYTES].cast("q")

    @staticmethod
    def num_bytes(size: int) -> int:
        """Returns how many bytes of memory a group needs, in whole cache lines."""
        return (1 + size) * LINE_BYTES + whole_lines((1 + size) * WORD_BYTES)

    @staticmethod
    def prepare(memory: mmap.mmap, size: int) -> None:
        """Makes memory that is all zeros ready; one rank does, before any comes."""
        lock, *gates = _semaphores(memory, size)
        _LIBC.sem_init(lock, 1, 1)
        for gate in gates:
            _LIBC.sem_init(gate, 1, 0)

    def come(self) -> None:
        """Tells the others that this rank has come.

        Raises:
            DistributedError: Another rank holds the lock for too long.
        """
        self._meetings += 1
        self._wait_for(self._lock)
        num_come = self._words[0] + 1
        self._words[0] = num_come % self._size
        _LIBC.sem_post(self._lock)
        if num_come == self._size:
            for gate in self._gates:
                _LIBC.sem_post(gate)
        self._words[1 + self._rank] = self._meetings

    def wait(self) -> None:
        """Waits until all have come.

        Raises:
            DistributedError: Some did not in time; it names them.
        """
        self._wait_for(self._gates[self._rank])

    def _wait_for(self, semaphore: ctypes.c_void_p) -> None:
        for _ in range(self._looks):
            if _LIBC.sem_trywait(semaphore) == 0:
                return
            os.sched_yield()  # the one it waits for may be on the same core
        now_s = time.monotonic() if _CAN_WAIT_MONOTONIC else time.time()
        until_s = now_s + self._timeout_s
        deadline = ctypes.byref(_TimeSpec(int(until_s), int(until_s % 1 * 1e9)))
        while _sleep_until(semaphore, deadline) != 0:
            if ctypes.get_errno() == errno.ETIMEDOUT:
                raise DistributedError(
                    f"{self._who_is_late()} of {self._size} on {os.uname().nodename} did not come "
                    f"to an exchange of rows within {self._timeout_s:g} s: hung, ended, or much "
                    "slower than this one."
                )

    def _who_is_late(self) -> str:
        came = enumerate(self._words[1:])
        late = [rank for rank, meetings in came if meetings < self._meetings]
        return ", ".join(f"rank {rank}" for rank in late if rank != self._rank)


def _semaphores(memory: mmap.mmap, size: int) -> list[ctypes.c_void_p]:
    """Returns the addresses of the lock and of every rank's gate."""
    first = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    return [ctypes.c_void_p(first + i * LINE_BYTES) for i in range(1 + size)]


def whole_lines(num_bytes: int) -> int:
    """Returns the bytes of the cache lines that so many bytes take."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES


def _sleep_until(semaphore: ctypes.c_void_p, deadline: object) -> int:
    if _CAN_WAIT_MONOTONIC:
        return _LIBC.sem_clockwait(semaphore, time.CLOCK_MONOTONIC, deadline)
    return _LIBC.sem_timedwait(semaphore, deadline)


class _TimeSpec(ctypes.Structure):
    """C's struct timespec, where a long is 64 bits."""

    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))
