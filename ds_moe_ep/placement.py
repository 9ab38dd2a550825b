"""Where every expert lives: integer functions from a plan and a model to what each GPU holds.

It moves no weights and makes no process groups. Contiguous experts are the rule; where slots are
filled by recorded loads instead, balance.py says how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import Coordinates, ParallelPlan

__all__ = [
    "GpuAssignment",
    "Placement",
    "RankGroups",
    "SlotPlacement",
    "assignment_matrix",
    "group_table",
    "make_placement",
    "ranges",
    "stage_moe_layers",
]


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
class SlotPlacement:
    """An expert in each slot of each ep_rank, layer by layer; copies of it may be in several.

    Slots of a layer are numbered rank after rank, so slot s is on ep_rank ``s // slots_per_rank``.

    Attributes:
        num_experts: Experts of a layer.
        num_ranks: Ranks of an expert group.
        slots_per_rank: Slots of a layer on each.
        expert_of_slot: By MoE layer, in ascending order, the expert of each slot.
    """

    num_experts: int
    num_ranks: int
    slots_per_rank: int
    expert_of_slot: Mapping[int, tuple[int, ...]]

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts."""
        return tuple(self.expert_of_slot)

    def owners(self, layer: int, expert: int) -> tuple[int, ...]:
        """Return the ep_ranks that hold an expert of a layer, each once.

        Raises:
            IndexError: if the layer has no experts or there is no such expert.
        """
        slots = [s for s, held in enumerate(self._slots(layer)) if held == expert]
        if not slots:
            raise IndexError(f"expert {expert} is not one of {self.num_experts} experts")
        return tuple(dict.fromkeys(slot // self.slots_per_rank for slot in slots))

    def local_experts(self, layer: int, ep_rank: int) -> tuple[int, ...]:
        """Return the ids of the experts in the slots of an ep_rank, slot by slot.

        Raises:
            IndexError: if the layer has no experts or there is no such ep_rank.
        """
        if not 0 <= ep_rank < self.num_ranks:
            raise IndexError(f"ep_rank {ep_rank} is not one of {self.num_ranks}")
        first = ep_rank * self.slots_per_rank
        return self._slots(layer)[first : first + self.slots_per_rank]

    def _slots(self, layer: int) -> tuple[int, ...]:
        if layer not in self.expert_of_slot:
            raise IndexError(f"layer {layer} is not one of the MoE layers {self.moe_layers}")
        return self.expert_of_slot[layer]


@dataclass(frozen=True)
class RankGroups:
    """Where one rank stands and the global ranks of each of its groups."""

    rank: int
    coordinates: Coordinates
    tp_group: tuple[int, ...]
    ep_group: tuple[int, ...]
    edp_group: tuple[int, ...]
    dense_dp_group: tuple[int, ...]
    pp_group: tuple[int, ...]


@dataclass(frozen=True)
class GpuAssignment:
    """What one GPU holds.

    Attributes:
        rank: global rank.
        host: name of its host.
        slot: number of the GPU on that host.
        ep_rank: rank within its expert group.
        experts: ids of its experts, the same in each of its MoE layers.
        num_layers: MoE layers it holds experts of.
        num_expert_instances: experts over all its layers.
        expert_memory_share: its part of one whole set of experts; over all GPUs that is dp_size.
        expected_load_share: its part of all expert work if all experts are chosen equally often;
            over all GPUs that is 1.
        dense_bytes: weights that are not routed experts; the even share if tp_size or pp_size > 1.
        expert_bytes: weights of its experts.
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


def group_table(plan: ParallelPlan) -> list[RankGroups]:
    """Return the groups of every rank, in rank order."""
    return [
        RankGroups(
            rank=rank,
            coordinates=plan.coordinates(rank),
            tp_group=plan.tp_group(rank),
            ep_group=plan.ep_group(rank),
            edp_group=plan.edp_group(rank),
            dense_dp_group=plan.dense_dp_group(rank),
            pp_group=plan.pp_group(rank),
        )
        for rank in range(plan.world_size)
    ]


def stage_moe_layers(plan: ParallelPlan, spec: ModelSpec, pp_rank: int) -> tuple[int, ...]:
    """Return the MoE layers of a pipeline stage.

    Stages are runs of consecutive layers, whose lengths differ by one at most.
    """
    first = pp_rank * spec.num_layers // plan.pp_size
    end = (pp_rank + 1) * spec.num_layers // plan.pp_size
    return tuple(layer for layer in spec.moe_layers if first <= layer < end)


def assignment_matrix(plan: ParallelPlan, spec: ModelSpec, cluster: Cluster) -> list[GpuAssignment]:
    """Return what each GPU holds, in rank order."""
    placement = make_placement(plan, spec)
    num_instances_in_model = spec.num_experts * len(spec.moe_layers)
    dense_bytes = spec.num_dense_params * spec.param_bytes // (plan.tp_size * plan.pp_size)
    rows = []
    for rank in range(plan.world_size):
        at = plan.coordinates(rank)
        host, slot = cluster.locate(rank)
        experts = tuple(placement.local_experts(at.ep_rank))
        num_layers = len(stage_moe_layers(plan, spec, at.pp_rank))
        num_instances = num_layers * len(experts)
        expert_bytes = num_instances * spec.num_params_per_expert * spec.param_bytes
        share = num_instances / (num_instances_in_model * plan.tp_size) if num_instances else 0.0
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
                dense_bytes=dense_bytes,
                expert_bytes=expert_bytes // plan.tp_size,
            )
        )
    return rows


def ranges(numbers: Sequence[int]) -> str:
    """Return ascending numbers as runs: 0-3,7."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text or "none"
