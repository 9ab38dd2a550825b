"""Starts torch.distributed and DeepSpeed on this rank, and makes the expert groups.

It holds no state: groups live where DeepSpeed keeps them (``deepspeed.utils.groups``) and are
handed on as arguments.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups

from ds_moe_ep.dist.group_timeout import (
    WATCHDOG_MARGIN_S,
    same_timeout_for_new_groups,
    timeout_of,
)
from ds_moe_ep.dist.node_groups import nodes_of
from ds_moe_ep.dist.rank_info import RankInfo, read_rank_info
from ds_moe_ep.dist.rendezvous import RollCall, join_process_group, told_if_not_met
from ds_moe_ep.errors import DistributedError, DsMoeEpError, PlanError
from ds_moe_ep.local_machine import free_port

__all__ = [
    "Job",
    "RankInfo",
    "create_expert_groups",
    "init_distributed",
    "read_rank_info",
    "refuse_missing_gpus",
]

T = TypeVar("T")

# DeepSpeed's shared-memory all-reduce for CPUs. Its op is built with a C++ compiler the first time
# (40 to 90 s), and a build that was killed leaves a lock on which every later job waits for ever.
_JIT_BUILT_OP = "deepspeed_shm_comm"


@dataclass(frozen=True)
class Job:
    """The running job as one rank sees it.

    Attributes:
        info: Who this process is.
        device: Where its tensors live.
        control: A gloo group of all ranks for small exchanges on the host.
        roll_call: Asks who is still there when the job breaks; None in a process group that was
            there before.
        nodes: Node of every rank, numbered in the order of ranks.
        hosts: Name of every rank's host.
        starting: As `control`, for waits as long as ranks may take to come up and to load; None
            where `control` waits for that long.
        is_done: Set once the ranks have met for the last time: from then on they may end.
    """

    info: RankInfo
    device: torch.device
    control: dist.ProcessGroup
    roll_call: RollCall | None = None
    nodes: tuple[int, ...] = ()
    hosts: tuple[str, ...] = ()
    starting: dist.ProcessGroup | None = None
    is_done: threading.Event = field(default_factory=threading.Event)

    def all_or_none(self, step: Callable[[], T], *, what: str, timeout_s: float) -> T:
        """Runs a step that any rank may refuse: all ranks go on together or fail together.

        Args:
            step: What to do on this rank.
            what: Its name in messages.
            timeout_s: How long the ranks wait for the slowest of them.

        Returns:
            What the step returned on this rank.

        Raises:
            DsMoeEpError: On every rank, the error of the lowest rank that has one, and how many
                others have one.
            DistributedError: Some rank did not come in time.
        """
        error: DsMoeEpError | None = None
        try:
            value = step()
        except DsMoeEpError as refused:
            error = refused
        self.wait_for_all(timeout_s, what)
        self._raise_any(error)
        return value

    def _raise_any(self, error: DsMoeEpError | None) -> None:
        own = None if error is None else (type(error), str(error), str(self.info))
        failed = [found for found in self.all_gather(own) if found is not None]
        if not failed:
            return
        kind, text, who = failed[0]
        if len(failed) == self.info.world_size:
            raise kind(text)
        others = f" (and {len(failed) - 1} other ranks)" if len(failed) > 1 else ""
        raise kind(f"[{who}]{others} {text}")

    def wait_for_all(self, timeout_s: float, what: str) -> None:
        """Waits until every rank has come here.

        Raises:
            DistributedError: Some did not come in time; it names them.
        """
        timeout, group = timedelta(seconds=timeout_s), self.control
        # In a barrier only rank 0 heeds its argument. The others wait for as long as the group.
        if self.starting is not None and timeout > (timeout_of(self.control) or timeout):
            group = self.starting
        try:
            dist.monitored_barrier(group, timeout, wait_all_ranks=True)
        except RuntimeError as error:
            raise DistributedError(
                f"[{self.info}] {what}: not all ranks came within {timeout_s:.0f} s: {error}"
            ) from error

    def all_gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, pickled on the way, by rank."""
        gathered: list = [None] * self.info.world_size
        dist.all_gather_object(gathered, value, group=self.control)
        return gathered

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks on rank 0, an empty list elsewhere."""
        gathered: list | None = [None] * self.info.world_size if self.info.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.control)
        return gathered or []


def init_distributed(
    info: RankInfo, *, timeout_s: float, start_timeout_s: float | None = None
) -> Job:
    """Joins the job's process group, or takes the one that is there, and lets DeepSpeed use it.

    Args:
        info: Who this process is.
        timeout_s: How long any wait for another rank may last.
        start_timeout_s: How long to wait for the last rank to come up, or to load; by default
            `timeout_s`.

    Raises:
        DistributedError: Some ranks did not come; it names them.
        PlanError: Some hosts have fewer GPUs than slots; it names them, on every rank.
    """
    accelerator = get_accelerator()
    on_gpu = accelerator.device_name() == "cuda"
    device = torch.device("cuda", info.local_rank) if on_gpu else torch.device("cpu")
    if info.world_size == 1 and not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    # DeepSpeed and accelerate read these too, and no launcher has set them for a single process.
    os.environ.update(
        RANK=str(info.rank), LOCAL_RANK=str(info.local_rank), WORLD_SIZE=str(info.world_size)
    )
    roll_call = None
    num_gpus = accelerator.device_count() if on_gpu else 0
    if not dist.is_initialized():
        roll_call = join_process_group(
            info.rank,
            info.world_size,
            backend="nccl" if on_gpu else "gloo",
            start_timeout_s=start_timeout_s or timeout_s,
            timeout_s=timeout_s + WATCHDOG_MARGIN_S if on_gpu else timeout_s,
            told=json.dumps([info.host, info.local_rank, num_gpus]),
            check=_check_gpus,
        )
    control = dist.group.WORLD
    if on_gpu:
        with told_if_not_met(info.rank, info.world_size):
            control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    with _without_jit_build():
        deepspeed.init_distributed(verbose=False)
    starting = None
    if start_timeout_s is not None and start_timeout_s > timeout_s:
        starting = dist.new_group(backend="gloo", timeout=timedelta(seconds=start_timeout_s))
    job = Job(info, device, control, roll_call, starting=starting)
    if on_gpu:
        accelerator.set_device(info.local_rank)
    hosts, local_ranks = zip(*job.all_gather((info.host, info.local_rank)), strict=True)
    return replace(job, nodes=tuple(nodes_of(hosts, local_ranks)), hosts=hosts)


def _check_gpus(told: Sequence[str]) -> None:
    """Refuses a job before its ranks wait for each other in groups of different kinds."""
    hosts, local_ranks, num_gpus = zip(*map(json.loads, told), strict=True)
    if any(num_gpus):  # else it runs on CPUs
        refuse_missing_gpus(hosts, local_ranks, num_gpus)


def refuse_missing_gpus(
    hosts: Sequence[str], local_ranks: Sequence[int], num_gpus: Sequence[int]
) -> None:
    """Refuses a job with ranks that have no GPU; each argument has an entry for every rank.

    Args:
        hosts: Their hosts.
        local_ranks: The number of the GPU that each is to use.
        num_gpus: How many GPUs each sees.

    Raises:
        PlanError: It names all hosts that have fewer GPUs than slots.
    """
    slots: dict[str, int] = {}
    for host, local_rank in zip(hosts, local_ranks, strict=True):
        slots[host] = max(slots.get(host, 0), local_rank + 1)
    there = dict(zip(hosts, num_gpus, strict=True))
    short = [host for host, num_slots in slots.items() if there[host] < num_slots]
    if short:
        told = "; ".join(f"{host}: {there[host]} GPUs for {slots[host]} slots" for host in short)
        raise PlanError(
            f"{told}. Write in the hostfile how many slots each host has, or leave hosts out "
            "(--exclude); CUDA_VISIBLE_DEVICES may hide GPUs or their driver may be broken, and "
            "`nvidia-smi -L` lists them."
        )


def create_expert_groups(ep_size: int) -> dist.ProcessGroup:
    """Makes DeepSpeed's expert groups of `ep_size` consecutive ranks, once; all ranks call it.

    Returns:
        This rank's.
    """
    name = f"ep_size_{ep_size}"
    if name not in groups._get_expert_parallel_group_dict():
        with same_timeout_for_new_groups():
            groups._create_expert_and_data_parallel(ep_size)
    return groups._get_expert_parallel_group(name)


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
