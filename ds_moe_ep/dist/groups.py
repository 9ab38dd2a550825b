"""Starts torch.distributed and DeepSpeed on this rank, and makes the expert groups.

It holds no state: groups live where DeepSpeed keeps them (``deepspeed.utils.groups``) and are handed on as arguments.
"""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from ds_moe_ep.errors import ConfigError, DistributedError

__all__ = ["RankInfo", "create_expert_groups", "init_distributed", "read_rank_info"]

# DeepSpeed's shared-memory all-reduce for CPUs. Its op is built with a C++ compiler the first time (40 to 90 s), and a
# build that was killed leaves a lock on which every later job waits for ever.
_JIT_BUILT_OP = "deepspeed_shm_comm"


@dataclass(frozen=True)
class RankInfo:
    """Who this process is, as its launcher says."""

    rank: int
    local_rank: int
    world_size: int

    def __str__(self) -> str:
        return f"rank {self.rank} {socket.gethostname()}"


def read_rank_info() -> RankInfo:
    """Reads RANK, LOCAL_RANK and WORLD_SIZE; without a launcher this is the only rank of one.

    Raises:
        ConfigError: Some of them are set and others not, or one is not a number.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name) for name in names]
    if values == [None, None, None]:
        return RankInfo(rank=0, local_rank=0, world_size=1)
    if not all(value is not None and value.isdigit() for value in values):
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(f"{found}: a launcher sets all three to numbers. Start with `deepspeed launch/infer.py ...`.")
    rank, local_rank, world_size = (int(value) for value in values if value is not None)
    return RankInfo(rank, local_rank, world_size)


def init_distributed(info: RankInfo, *, timeout_s: float) -> torch.device:
    """Joins the process group of the job and lets DeepSpeed use it.

    Collectives on the accelerator use its own backend; small host-side exchanges use gloo.

    Args:
        info: Who this process is.
        timeout_s: How long any wait for another rank may last, the rendezvous included.

    Returns:
        The device of this rank.

    Raises:
        DistributedError: The ranks did not find each other.
    """
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() == "cuda"
    device = torch.device("cuda", info.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        accelerator.set_device(info.local_rank)
    if info.world_size == 1 and "MASTER_ADDR" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()), RANK="0", WORLD_SIZE="1")
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            rank=info.rank,
            world_size=info.world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistError, RuntimeError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise DistributedError(
            f"[{info}] the {info.world_size} ranks did not meet at {where} within {timeout_s:.0f} s ({error}). "
            "Look for a rank that did not start, a port in use (--master_port) or a wrong network interface."
        ) from error
    with _without_jit_build():
        deepspeed.init_distributed(dist_init_required=False if deepspeed.comm.is_initialized() else None, verbose=False)
    return device


def create_expert_groups(ep_size: int) -> None:
    """Makes DeepSpeed's expert and expert-data groups of `ep_size` consecutive ranks, once; all ranks call it."""
    if f"ep_size_{ep_size}" not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(ep_size)


@contextlib.contextmanager
def _without_jit_build():
    """Keeps DeepSpeed from building its CPU all-reduce op on the way: gloo does that work here."""
    compatible = deepspeed.ops.__compatible_ops__
    before = compatible.get(_JIT_BUILT_OP)
    compatible[_JIT_BUILT_OP] = False
    try:
        yield
    finally:
        if before is not None:
            compatible[_JIT_BUILT_OP] = before


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
