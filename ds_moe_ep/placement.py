"""Where every expert lives: pure integer functions from a plan and a model to experts, layers and bytes of each GPU.

It moves no weights and makes no process groups.
"""

from dataclasses import dataclass

from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import ParallelPlan

__all__ = ["GpuAssignment", "Placement", "assignment_matrix", "make_placement", "stage_layers"]


@dataclass(frozen=True)
class Placement:
    """Contiguous experts on each ep_rank, the same in every MoE layer."""

    num_experts: int
    ep_size: int
    moe_layers: tuple[int, ...]

    @property
    def num_local_experts(self) -> int:
        """Number of experts of one layer on one ep_rank."""
        return self.num_experts // self.ep_size

    def owner(self, layer: int, expert: int) -> int:
        """Return the ep_rank that holds an expert of a layer: "where is expert 37 of layer 5".

        Raises:
            IndexError: if the layer has no experts or there is no such expert.
        """
        if layer not in self.moe_layers:
            raise IndexError(f"layer {layer} is not one of the MoE layers {self.moe_layers}")
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} is not one of {self.num_experts} experts")
        return expert // self.num_local_experts

    def local_experts(self, ep_rank: int) -> range:
        """Return the ids of the experts an ep_rank holds in every MoE layer.

        Raises:
            IndexError: if there is no such ep_rank.
        """
        if not 0 <= ep_rank < self.ep_size:
            raise IndexError(f"ep_rank {ep_rank} is not one of {self.ep_size}")
        return range(ep_rank * self.num_local_experts, (ep_rank + 1) * self.num_local_experts)


@dataclass(frozen=True)
class GpuAssignment:
    """What one GPU holds.

    `expert_memory_share` is the part of one whole set of experts that lies here (over all GPUs it sums to dp_size);
    `expected_load_share` the part of all expert work done here if every expert is chosen equally often (sums to 1).
    """

    rank: int
    host: str
    slot: int
    ep_rank: int
    experts: tuple[int, ...]
    num_layers: int
    num_expert_instances: int
    expert_memory_share: float
    expected_load_share: float
    dense_bytes: int
    expert_bytes: int


def make_placement(plan: ParallelPlan, spec: ModelSpec) -> Placement:
    """Return where the experts of a model live under a plan."""
    return Placement(num_experts=spec.num_experts, ep_size=plan.ep_size, moe_layers=spec.moe_layers)


def stage_layers(plan: ParallelPlan, spec: ModelSpec, pp_rank: int) -> range:
    """Return the layers of a pipeline stage; stages differ by at most one layer."""
    return range(
        pp_rank * spec.num_layers // plan.pp_size, (pp_rank + 1) * spec.num_layers // plan.pp_size
    )


def assignment_matrix(plan: ParallelPlan, spec: ModelSpec, cluster: Cluster) -> list[GpuAssignment]:
    """Return one row per GPU, in rank order.

    Dense bytes are exact for tp_size = pp_size = 1; otherwise they are the even share of the total.
    """
    placement = make_placement(plan, spec)
    rows = []
    for rank in range(plan.world_size):
        at = plan.coordinates(rank)
        host, slot = cluster.locate(rank)
        experts = tuple(placement.local_experts(at.ep_rank))
        num_layers = sum(layer in spec.moe_layers for layer in stage_layers(plan, spec, at.pp_rank))
        num_instances = num_layers * len(experts)
        num_all_instances = len(spec.moe_layers) * spec.num_experts
        share = num_instances / (num_all_instances * plan.tp_size) if num_all_instances else 0.0
        rows.append(
            GpuAssignment(
                rank=rank,
                host=host,
                slot=slot,
                ep_rank=at.ep_rank,
                experts=experts,
                num_layers=num_layers,
                num_expert_instances=num_instances,
                expert_memory_share=share,
                expected_load_share=share / plan.dp_size,
                dense_bytes=spec.num_dense_params
                * spec.param_bytes
                // (plan.tp_size * plan.pp_size),
                expert_bytes=num_instances
                * spec.num_params_per_expert
                * spec.param_bytes
                // plan.tp_size,
            )
        )
    return rows
