"""Ranks that are only slow, or were stopped together, are not given up (lost ones: tests/e2e)."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from ds_moe_ep.dist.groups import Job, RankInfo, init_distributed
from ds_moe_ep.dist.rendezvous import RollCall
from ds_moe_ep.engine.heartbeat import heartbeat
from ds_moe_ep.engine.supervisor import Progress
from tests.helpers import run_ranks
from tests.helpers.launch import free_port

_LIMIT_S = 3.0

# Ctrl-Z and `fg`.
_STOP_AND_GO_ON = """
import os, sys, time
limit_s, *pids = map(int, sys.argv[1:])
for number in (STOP, CONT):
    for pid in pids:
        os.kill(pid, number)
    time.sleep(2 * limit_s)
""".replace("STOP", str(int(signal.SIGSTOP))).replace("CONT", str(int(signal.SIGCONT)))


def _job(rank: int, world_size: int, port: int) -> Job:
    """Returns a job whose ranks have met at a store, as those of a launcher do."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    job = init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    store = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=rank == 0,
        timeout=timedelta(seconds=60),
        wait_for_workers=False,
    )
    roll_call = RollCall(store, rank, world_size)
    roll_call.tell("")
    job = replace(job, roll_call=roll_call)
    job.wait_for_all(60, "meeting")
    return job


def _work_for_long() -> None:
    until_s = time.monotonic() + 3 * _LIMIT_S
    while time.monotonic() < until_s:
        torch.randn(512, 512) @ torch.randn(512, 512)


def _be_stopped_for_long(job: Job) -> None:
    pids = list(map(str, job.all_gather(os.getpid())))
    if job.info.rank == 0:
        command = [sys.executable, "-c", _STOP_AND_GO_ON, str(int(_LIMIT_S)), *pids]
        with subprocess.Popen(command):
            pass
    job.wait_for_all(60, "going on")


def _is_not_given_up(rank: int, world_size: int, port: int, what: str) -> bool:
    job = _job(rank, world_size, port)
    with heartbeat(job, Progress("loading weights"), _LIMIT_S, lambda *_: 1):
        if what == "stopped":
            _be_stopped_for_long(job)
        elif rank == world_size - 1:
            _work_for_long()
        job.wait_for_all(60, "loading weights")
    job.wait_for_all(60, "the end")
    return True


@pytest.mark.parametrize("what", ["slow", "stopped"])
def test_ranks_that_are_slow_or_were_stopped_together_go_on(what: str, tmp_path):
    """One that was given up would end, and fail this."""
    assert all(run_ranks(_is_not_given_up, 3, tmp_path, free_port(), what))
