"""Ranks tell each other that they are there, until their first pass.

Until then they wait for each other for as long as loading may take, so a rank that was stopped or
cut off would hold them for as long. In passes waits are short, and this is at rest.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch.distributed as dist

from ds_moe_ep.dist.groups import Job
from ds_moe_ep.dist.rendezvous import RollCall
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.engine.wake import wake_when_others_end
from ds_moe_ep.errors import DistributedError

__all__ = ["heartbeat"]

_PERIOD_S = 1.0
# By then a rank that has failed, or its supervisor, has said why, and its launcher has ended the
# others of its host; and at the normal end all have left.
_LEFT_S = 10.0


@contextlib.contextmanager
def heartbeat(
    job: Job, progress: Progress, limit_s: float, lost: Callable[[DistributedError, Job], int]
) -> Iterator[None]:
    """Ends this rank if others are not heard of, or have failed, before the first pass.

    Rank 0 listens to all, the others to rank 0, which holds the store that this goes through.

    Args:
        job: The job. Process groups that were there before have no store, and so no heartbeat.
        progress: Where this rank is; others are told.
        limit_s: For how long a rank may be silent.
        lost: Tells who is silent, with the job as a thread of its own may use it; returns the exit
            code of this rank.
    """
    if job.roll_call is None or job.info.world_size == 1:
        yield
        return
    roll_call = job.roll_call.with_own_client()
    connections = wake_when_others_end(job)
    progress.share(list(connections))
    heart = _Heart(
        replace(job, roll_call=roll_call), roll_call, progress, limit_s, lost, connections
    )
    for work in (heart.beat, heart.listen):
        threading.Thread(target=work, name=f"heartbeat-{work.__name__}", daemon=True).start()
    try:
        yield
    finally:
        job.is_done.set()


class _Heart:
    """Two threads: one may wait for a store that was stopped for ever, the other notices."""

    def __init__(
        self,
        job: Job,
        roll_call: RollCall,
        progress: Progress,
        limit_s: float,
        lost: Callable[[DistributedError, Job], int],
        connections: Mapping[int, int],
    ) -> None:
        self._job, self._roll_call, self._progress = job, roll_call, progress
        self._limit_s, self._lost = limit_s, lost
        others = range(1, job.info.world_size) if job.info.rank == 0 else [0]
        self._heard = {rank: "" for rank in others}
        self._has_rank_0_left = self._has_rank_failed = False
        self._connections = connections
        self._ends = select.poll()
        for each in connections:
            self._ends.register(each, select.POLLIN)

    def beat(self) -> None:
        """Tells that this rank is there, and hears of the others, while the store answers."""
        number = 0
        while self._is_needed(_PERIOD_S):
            number += 1
            try:
                self._roll_call.tell(f"{number} {self._progress}")
                self._has_rank_failed = self._roll_call.has_rank_failed()
                self._heard = self._roll_call.hear(list(self._heard))
            except (dist.DistError, RuntimeError):
                self._has_rank_0_left = True
                return

    def listen(self) -> None:
        """Looks for ranks of which nothing new is heard.

        All is counted by looks: a clock goes on while a job is stopped that is to go on (Ctrl-Z).
        """
        before, silent_s = self._heard, dict.fromkeys(self._heard, 0.0)
        while self._is_needed(_PERIOD_S):
            ended = dict(self._ends.poll(0))  # killed, a rank has not said that it failed
            unseen = [self._connections[each] for each in ended if not _is_seen(each)]
            if unseen and not self._has_rank_failed:
                os._exit(self._lost(self._error(unseen[0], "ended without a word"), self._job))
            if ended or self._has_rank_failed or self._has_rank_0_left:
                self._leave_quietly()
                return
            heard = self._heard
            for rank, words in heard.items():
                silent_s[rank] = silent_s[rank] + _PERIOD_S if words == before[rank] else 0.0
            before = heard
            lost = [rank for rank, how_long_s in silent_s.items() if how_long_s >= self._limit_s]
            if lost:
                error = self._error(lost[0], f"was last heard of {self._limit_s:.0f} s ago")
                os._exit(self._lost(error, self._job))

    def _leave_quietly(self) -> None:
        """Ends this rank, unless it ends by itself: why the job is over is for others to say."""
        if not self._has_rank_0_left:
            self._roll_call.answer()  # which tells the others, if nobody has
        for _ in range(int(_LEFT_S / _PERIOD_S)):
            if not self._is_needed(_PERIOD_S):
                return
        os._exit(1)

    def _is_needed(self, wait_s: float) -> bool:
        return not self._job.is_done.wait(wait_s) and self._progress.step == 0

    def _error(self, rank: int, what: str) -> DistributedError:
        place = self._heard[rank].partition(" ")[2] or "meeting the other ranks"
        return DistributedError(f"rank {rank} ({self._job.hosts[rank]}) {what}, at {place}.")


def _is_seen(connection: int) -> bool:
    """Returns whether a supervisor has said on it that it knows why its worker ended."""
    try:
        with socket.socket(fileno=os.dup(connection)) as end:
            return bool(end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        return False
