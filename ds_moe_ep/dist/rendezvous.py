"""How the ranks of a job find each other, within a bound, and who is named if some do not come.

Ranks of a large job come up minutes apart (64 Python processes on a few cores), so this wait has a
bound of its own, longer than that of any later one.
"""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

from ds_moe_ep.errors import DistributedError

__all__ = ["join_process_group"]

_SHOWN = 8


def join_process_group(
    rank: int, world_size: int, *, backend: str, start_timeout_s: float, timeout_s: float
) -> None:
    """Waits for all ranks at MASTER_ADDR:MASTER_PORT, then starts the default process group.

    Args:
        rank: This rank.
        world_size: How many there are.
        backend: ``gloo`` or ``nccl``.
        start_timeout_s: How long to wait for the last rank to come up.
        timeout_s: How long any later wait in the group may last.

    Raises:
        DistributedError: Some ranks did not come; it names them.
    """
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _open_store(rank, world_size, start_timeout_s)
        _wait_for_all(store, rank, world_size, start_timeout_s)
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except (dist.DistError, RuntimeError, _MissingRanksError) as error:
        raise DistributedError(
            f"[rank {rank} {os.uname().nodename}] the {world_size} ranks did not meet at "
            f"{where}: {str(error).rstrip('.')}. Look for a rank that did not start, a port in "
            "use (--master_port) or a wrong network interface (GLOO_SOCKET_IFNAME, "
            "NCCL_SOCKET_IFNAME)."
        ) from error


class _MissingRanksError(Exception):
    """Some ranks did not come."""


def _open_store(rank: int, world_size: int, timeout_s: float) -> dist.Store:
    """Opens the store that torch's own rendezvous would, but one that can say who is missing."""
    # Under torch's elastic agent, which accelerate uses, the agent holds the store.
    agent_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master=rank == 0 and not agent_holds_it,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"ds_moe_ep/{attempt}", store)


def _wait_for_all(store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
    arrived = [f"arrived/{each}" for each in range(world_size)]
    store.set(arrived[rank], b"")
    try:
        store.wait(arrived, timedelta(seconds=timeout_s))
    except dist.DistStoreError as error:
        missing = [each for each, key in enumerate(arrived) if not store.check([key])]
        shown = ", ".join(map(str, missing[:_SHOWN])) + (" ..." if len(missing) > _SHOWN else "")
        raise _MissingRanksError(
            f"{len(missing)} of {world_size} ranks did not come within {timeout_s:.0f} s: {shown}"
        ) from error
