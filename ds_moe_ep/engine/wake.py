"""Connects rank 0 with every other, so that the kernel tells of the end of a rank.

A rank that was killed tells nobody, and DeepSpeed's launcher only those of its host. And if a rank
and its supervisor are stopped, with no other rank on their host, nobody else is there to end them,
and a job lasts until DeepSpeed's launchers on all hosts have ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from typing import cast

from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.supervisor import wake_after

__all__ = ["wake_when_others_end"]

_CONNECT_S = 5.0
_STRANGERS = 128  # that may connect before ranks do, and keep none of them out
_TOKEN_BYTES = 16
_HELLO_BYTES = 4 + _TOKEN_BYTES


def wake_when_others_end(job: Job) -> dict[int, int]:
    """Has rank 0's supervisor woken when another rank ends, and the others' when rank 0 does.

    All others connect to rank 0. Where that is not possible, through a firewall say, the job goes
    on without.

    Args:
        job: The job.

    Returns:
        Descriptors that can be read once the rank at their other end has ended, and that rank.
    """
    held = {}
    for rank, connection in (_listen(job) if job.info.rank == 0 else _connect(job)).items():
        wake_after(connection)
        # Held until this process ends. A rank that is stopped, on a host with others too, must not
        # end before somebody has said who does not answer.
        held[connection.detach()] = rank
    return held


def _listen(job: Job) -> dict[int, socket.socket]:
    """Returns, on rank 0, the connections of the others, by rank."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    backlog = job.info.world_size + _STRANGERS
    token = secrets.token_bytes(_TOKEN_BYTES)
    with socket.create_server(
        ("", 0), family=family, backlog=backlog, dualstack_ipv6=both
    ) as listener:
        job.all_gather((listener.getsockname()[1], token))
        called = job.all_gather(False)
        hellos = {_hello(rank, token): rank for rank, has in enumerate(called) if has}
        connections = _accept(listener, hellos)
    job.all_gather(list(connections))
    return connections


def _accept(listener: socket.socket, hellos: Mapping[bytes, int]) -> dict[int, socket.socket]:
    """Returns the connections of ranks, by rank, and drops those of anybody else.

    A port scanner's or a health probe's would end like that of a rank, and so would end the job.

    Args:
        listener: Ranks have connected to it and said their hello; others may have, too.
        hellos: The rank of each hello.
    """
    known: dict[int, socket.socket] = {}
    deadline_s = time.monotonic() + _CONNECT_S
    with selectors.DefaultSelector() as calls:
        calls.register(listener, selectors.EVENT_READ)
        while len(known) < len(hellos) and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in calls.select(left_s):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        calls.register(_take(listener), selectors.EVENT_READ)
                    continue
                call = cast("socket.socket", key.fileobj)
                calls.unregister(call)
                rank = hellos.get(_read_hello(call))
                if rank is None or rank in known:
                    call.close()
                else:
                    known[rank] = call
        for key in list(calls.get_map().values()):
            if key.fileobj is not listener:
                cast("socket.socket", key.fileobj).close()  # it has said nothing
    return known


def _take(listener: socket.socket) -> socket.socket:
    call, _ = listener.accept()
    call.setblocking(False)
    # Not readable before all of a hello is there, or the other end has gone.
    call.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, _HELLO_BYTES)
    return call


def _read_hello(call: socket.socket) -> bytes:
    try:
        call.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
        return call.recv(_HELLO_BYTES)
    except OSError:
        return b""


def _connect(job: Job) -> dict[int, socket.socket]:
    """Returns, on any other, its connection to rank 0, if that has heard of it."""
    port, token = job.all_gather((0, b""))[0]
    rank = job.info.rank
    connections = {}
    with contextlib.suppress(OSError):
        where = os.environ.get("MASTER_ADDR", ""), port
        connection = socket.create_connection(where, timeout=_CONNECT_S)
        connection.sendall(_hello(rank, token))
        connections[0] = connection
    job.all_gather(bool(connections))
    if rank not in job.all_gather([])[0]:
        for each in connections.values():
            each.close()
        return {}
    return connections


def _hello(rank: int, token: bytes) -> bytes:
    return rank.to_bytes(_HELLO_BYTES - _TOKEN_BYTES, "big") + token
