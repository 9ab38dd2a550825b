"""Who this process is among the ranks of a job, as its launcher says; no torch."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field

from ds_moe_ep.errors import ConfigError

__all__ = ["RankInfo", "read_rank_info"]

# By which srun and mpirun (also behind `deepspeed --launcher slurm` and others) count processes.
_COUNTED_BY_OTHERS = (
    "OMPI_COMM_WORLD_SIZE",
    "PMI_SIZE",
    "MV2_COMM_WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


@dataclass(frozen=True)
class RankInfo:
    """Who this process is, as its launcher says."""

    rank: int
    local_rank: int
    world_size: int
    host: str = field(default_factory=socket.gethostname)

    def __str__(self) -> str:
        """Names the rank the way error messages do."""
        return f"rank {self.rank} {self.host}"


def read_rank_info() -> RankInfo:
    """Reads RANK, LOCAL_RANK and WORLD_SIZE; without a launcher this is the only rank of one.

    Raises:
        ConfigError: Some of them are set and others not, one is not a number, MASTER_ADDR and
            MASTER_PORT do not say where several ranks meet, or a launcher that sets none of them
            has started several processes.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    values = [os.environ.get(name) for name in names]
    if values == [None, None, None]:
        _refuse_other_launchers()
        return RankInfo(rank=0, local_rank=0, world_size=1)
    if not all(value is not None and value.isdigit() for value in values):
        found = ", ".join(f"{name}={value}" for name, value in zip(names, values, strict=True))
        raise ConfigError(
            f"{found}: a launcher sets all three to numbers. Start with `deepspeed "
            "launch/infer.py ...`."
        )
    rank, local_rank, world_size = (int(value) for value in values if value is not None)
    if world_size > 1 and not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
        raise ConfigError(
            f"WORLD_SIZE={world_size}, but MASTER_ADDR and MASTER_PORT do not say where the ranks "
            "meet: the host of rank 0 and a free port there. A launcher sets them: `deepspeed "
            "launch/infer.py ...`, or the run.sbatch that ds-moe-ep config writes."
        )
    return RankInfo(rank, local_rank, world_size)


def _refuse_other_launchers() -> None:
    """Refuses to be one of several processes, each of which would take itself for the only rank."""
    for name in _COUNTED_BY_OTHERS:
        count = os.environ.get(name, "")
        if count.isdigit() and int(count) > 1:
            raise ConfigError(
                f"{name}={count}, but RANK, LOCAL_RANK and WORLD_SIZE do not say which rank this "
                "is. Start with `deepspeed --launcher pdsh launch/infer.py ...`, or with the "
                "run.sbatch that ds-moe-ep config writes, which sets them for srun."
            )
