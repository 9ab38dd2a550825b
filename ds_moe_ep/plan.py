"""The parallel plan: how many ranks hold parts of the experts, of the tensors, of the layers, and which rank is in which group.

It is arithmetic on integers. Which expert lives where is in placement.py; process groups are made in dist/.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ds_moe_ep.errors import PlanError
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec

__all__ = ["Coordinates", "ParallelPlan", "check_plan", "make_plan", "valid_ep_sizes"]


@dataclass(frozen=True)
class Coordinates:
    """Where a rank stands in each parallel dimension."""

    pp_rank: int
    dp_rank: int
    ep_rank: int
    tp_rank: int


@dataclass(frozen=True)
class ParallelPlan:
    """Sizes of the parallel dimensions.

    Ranks are numbered tp first, then ep, dp, pp: with tp_size=1 an expert group is a run of consecutive ranks,
    as DeepSpeed makes it. `dp_size` counts the copies of each expert.
    """

    ep_size: int
    tp_size: int = 1
    pp_size: int = 1
    dp_size: int = 1

    def __str__(self) -> str:
        """Return the plan as people write it, "EP64 TP1 PP1 DP1"."""
        return f"EP{self.ep_size} TP{self.tp_size} PP{self.pp_size} DP{self.dp_size}"

    @property
    def world_size(self) -> int:
        """Number of ranks, one per GPU."""
        return self.ep_size * self.tp_size * self.pp_size * self.dp_size

    @property
    def dense_dp_size(self) -> int:
        """Number of replicas of the dense weights, each with its own part of the batch."""
        return self.ep_size * self.dp_size

    def identities(self) -> tuple[str, str]:
        """Return the two identities that tie the sizes to the number of GPUs, with numbers filled in."""
        experts = (
            f"experts: ep_size {self.ep_size} * tp_size {self.tp_size} * pp_size {self.pp_size} * "
            f"dp_size {self.dp_size} = {self.world_size} GPUs"
        )
        dense = (
            f"dense: dense_dp_size {self.dense_dp_size} * tp_size {self.tp_size} * pp_size {self.pp_size} = "
            f"{self.world_size} GPUs"
        )
        return experts, dense

    def coordinates(self, rank: int) -> Coordinates:
        """Return where a rank stands in each dimension.

        Raises:
            IndexError: if there is no such rank.
        """
        if not 0 <= rank < self.world_size:
            raise IndexError(f"rank {rank} is not one of {self.world_size} ranks")
        rest, tp_rank = divmod(rank, self.tp_size)
        rest, ep_rank = divmod(rest, self.ep_size)
        pp_rank, dp_rank = divmod(rest, self.dp_size)
        return Coordinates(pp_rank=pp_rank, dp_rank=dp_rank, ep_rank=ep_rank, tp_rank=tp_rank)

    def rank(self, at: Coordinates) -> int:
        """Return the global rank at some coordinates; the inverse of `coordinates`."""
        return (
            (at.pp_rank * self.dp_size + at.dp_rank) * self.ep_size + at.ep_rank
        ) * self.tp_size + at.tp_rank

    def tp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the parts of the same tensors as `rank`."""
        return self._group(rank, tp=True)

    def ep_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that together hold one copy of every expert, `rank` among them."""
        return self._group(rank, ep=True)

    def edp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold a copy of the same experts as `rank`."""
        return self._group(rank, dp=True)

    def dense_dp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold a copy of the same dense weights as `rank`."""
        return self._group(rank, ep=True, dp=True)

    def pp_group(self, rank: int) -> tuple[int, ...]:
        """Return the ranks that hold the successive stages of the model `rank` is a stage of."""
        return self._group(rank, pp=True)

    def _group(
        self, rank: int, *, pp: bool = False, dp: bool = False, ep: bool = False, tp: bool = False
    ) -> tuple[int, ...]:
        """Return the ranks that differ from `rank` in the named dimensions only, ascending."""
        at = self.coordinates(rank)
        return tuple(
            self.rank(Coordinates(pp_rank, dp_rank, ep_rank, tp_rank))
            for pp_rank in (range(self.pp_size) if pp else (at.pp_rank,))
            for dp_rank in (range(self.dp_size) if dp else (at.dp_rank,))
            for ep_rank in (range(self.ep_size) if ep else (at.ep_rank,))
            for tp_rank in (range(self.tp_size) if tp else (at.tp_rank,))
        )


def valid_ep_sizes(num_experts: int, at_most: int | None = None) -> list[int]:
    """Return the divisors of num_experts up to `at_most`, ascending."""
    limit = num_experts if at_most is None else min(num_experts, at_most)
    return [size for size in range(1, limit + 1) if num_experts % size == 0]


def make_plan(
    cluster: Cluster,
    spec: ModelSpec | None = None,
    *,
    ep_size: int | None = None,
    tp_size: int = 1,
    pp_size: int = 1,
    dp_size: int = 1,
) -> ParallelPlan:
    """Return the plan of these sizes after checking it.

    Args:
        cluster: the GPUs to fill.
        spec: the model; without it only the number of GPUs is checked.
        ep_size: ranks an expert layer is spread over; by default what fills the cluster.
        tp_size: ranks each tensor is spread over.
        pp_size: ranks the layers are spread over.
        dp_size: copies of each expert.

    Raises:
        PlanError: with the numbers and the nearest plans that fit.
    """
    if ep_size is None:
        others = max(1, tp_size * pp_size * dp_size)
        ep_size = max(1, cluster.num_gpus // others)
    plan = ParallelPlan(ep_size=ep_size, tp_size=tp_size, pp_size=pp_size, dp_size=dp_size)
    check_plan(plan, cluster, spec)
    return plan


def check_plan(plan: ParallelPlan, cluster: Cluster, spec: ModelSpec | None = None) -> None:
    """Refuse a plan that does not fill the cluster or does not fit the model.

    Raises:
        PlanError: with the numbers and the nearest plans that fit.
    """
    if plan.world_size != cluster.num_gpus:
        raise PlanError(
            f"{plan} needs {plan.world_size:,} GPUs, but {cluster.num_gpus:,} are there ({cluster.source})."
        )
