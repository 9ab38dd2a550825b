"""Connects rank 0 with every other, so that the kernel tells of the end of a rank.

A rank that was killed tells nobody, and DeepSpeed's launcher only those of its host. And if a rank
and its supervisor are stopped, with no other rank on their host, nobody else is there to end them,
and a job lasts until DeepSpeed's launchers on all hosts have ended.
"""

from __future__ import annotations

import contextlib
import os
import socket

from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.supervisor import wake_after

__all__ = ["wake_when_others_end"]

_CONNECT_S = 5.0


def wake_when_others_end(job: Job) -> list[int]:
    """Has rank 0's supervisor woken when another rank ends, and the others' when rank 0 does.

    All others connect to rank 0. Where that is not possible, through a firewall say, the job goes
    on without.

    Args:
        job: The job.

    Returns:
        Descriptors that can be read once a rank at their other end has ended.
    """
    held = []
    for connection in _listen(job) if job.info.rank == 0 else _connect(job):
        wake_after(connection)
        # Held until this process ends. A rank that is stopped, on a host with others too, must not
        # end before somebody has said who does not answer.
        held.append(connection.detach())
    return held


def _listen(job: Job) -> list[socket.socket]:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    connections = []
    with socket.create_server(
        ("", 0), family=family, backlog=job.info.world_size, dualstack_ipv6=both
    ) as listener:
        job.all_gather(listener.getsockname()[1])
        num_connected = sum(job.all_gather(0))
        listener.settimeout(_CONNECT_S)
        with contextlib.suppress(OSError):
            for _ in range(num_connected):
                connections.append(listener.accept()[0])
    return connections


def _connect(job: Job) -> list[socket.socket]:
    where = os.environ.get("MASTER_ADDR", ""), job.all_gather(0)[0]
    connections = []
    with contextlib.suppress(OSError):
        connections.append(socket.create_connection(where, timeout=_CONNECT_S))
    job.all_gather(len(connections))
    return connections
