"""Ranks are connected with rank 0, and nobody else is."""

import os
import select
import socket

import pytest

from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.engine import wake
from tests.helpers import run_ranks
from tests.helpers.launch import free_port

_held: list[socket.socket] = []


def _meet_strangers(what: str) -> None:
    """Has strangers connect as rank 0 begins to listen."""
    create_server = socket.create_server

    def create(*args, **options):
        listener = create_server(*args, **options)
        for _ in range(3):
            call = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
            if what == "talk":
                call.sendall(b"GET / HTTP/1.1\r\nHost: worker-0\r\n\r\n")
            if what == "go":
                call.close()
            _held.append(call)
        return listener

    socket.create_server = create


def _connected(rank: int, world_size: int, port: int, what: str) -> tuple[list[int], bool]:
    """Returns with whom a rank is connected, and whether any of them seems to have ended."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    job = init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    if rank == 0:
        _meet_strangers(what)
    held = wake.wake_when_others_end(job)
    ends = select.poll()
    for each in held:
        ends.register(each, select.POLLIN)
    has_any_ended = bool(ends.poll(500))
    job.wait_for_all(60, "the end")
    return sorted(held.values()), has_any_ended


@pytest.mark.parametrize("what", ["go", "talk", "say nothing"])
def test_strangers_that_come_first_are_not_taken_for_ranks(what: str, tmp_path):
    found = run_ranks(_connected, 3, tmp_path, free_port(), what)
    assert found == [([1, 2], False), ([0], False), ([0], False)]
