"""Puts DeepSpeed MoE layers with one rank's experts in place of a Hugging Face model's experts.

It is written against what transformers declares of experts modules, not against model families:
the experts contract (``transformers/integrations/moe.py``) and the expert-parallel plan.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from ds_moe_ep.dist.groups import create_expert_groups
from ds_moe_ep.dist.node_groups import create_node_groups, open_within_nodes
from ds_moe_ep.errors import AdapterError
from ds_moe_ep.model_families import UNSUPPORTED
from ds_moe_ep.moe.dispatch import TWO_LEVEL, make_links
from ds_moe_ep.moe.expert_gemm import declares_contract, lay_out_for_cpu
from ds_moe_ep.moe.experts import expert_parameters
from ds_moe_ep.moe.layer import ExpertParallelMoE
from ds_moe_ep.moe.probe import measure_links
from ds_moe_ep.moe.shared_expert import EarlySharedExpert
from ds_moe_ep.moe.slots import ExpertSlots
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import HOW_TO_UPCYCLE, ParallelPlan, uneven_experts

__all__ = [
    "AdaptReport",
    "SwappedLayer",
    "adapt",
    "bind_expert_groups",
    "check_ep_size",
    "check_supported",
    "moe_layers",
    "prepare_for_inference",
    "shard_experts",
]

# How a model's expert-parallel plan names an experts module that is called with a routing.
_DISPATCHED = "ep_dispatch_experts"
# What families call the expert of all tokens, which stands beside the experts.
_SHARED_EXPERT = ("shared_experts", "shared_expert", "shared_mlp")


@dataclass(frozen=True)
class SwappedLayer:
    """One swapped layer: where it is, what was there, and which experts this rank keeps of it.

    `local_experts` are consecutive, or those in this rank's slots if they were placed so.
    """

    name: str
    class_name: str
    num_experts: int
    local_experts: Sequence[int]


@dataclass(frozen=True)
class AdaptReport:
    """What `adapt` did to a model."""

    layers: tuple[SwappedLayer, ...]
    ep_rank: int
    ep_size: int

    def __str__(self) -> str:
        first = self.layers[0]
        local = first.local_experts
        held = f"experts {local[0]} to {local[-1]} of {first.num_experts} in each"
        if not isinstance(local, range):
            held = f"{len(local)} of {first.num_experts} experts in each, by placement"
        return (
            f"{len(self.layers)} MoE layers ({first.class_name}) swapped: ep_rank {self.ep_rank} "
            f"of {self.ep_size} holds {held}"
        )


def adapt(
    model: nn.Module,
    plan: ParallelPlan,
    *,
    ep_rank: int,
    dispatcher: str = "auto",
    placement: SlotPlacement | None = None,
) -> AdaptReport:
    """Replaces every experts module by an `ExpertParallelMoE` with this rank's experts, in place.

    The router, shared experts and everything else stay Hugging Face's. Works on loaded weights and
    on the meta device, with or without a call of `shard_experts` before. Bind the groups afterwards
    (`bind_expert_groups`).

    Args:
        model: A transformers model.
        plan: The parallel sizes; ep_size is what counts here.
        ep_rank: Rank in the expert group.
        dispatcher: Name of the dispatcher, or ``auto``.
        placement: Experts in slots; by default they are contiguous.

    Returns:
        What was swapped.

    Raises:
        AdapterError: The family cannot be supported, the model has no MoE layer that follows the
            experts contract, ep_size does not divide its experts, or they are placed for others.
    """
    swapped = shard_experts(model, plan.ep_size, ep_rank, placement)
    slots = placement and [ExpertSlots(held) for held in placement.expert_of_slot.values()]
    for number, layer in enumerate(swapped):
        parent_name, _, attribute = layer.name.rpartition(".")
        experts = model.get_submodule(layer.name)
        moe = ExpertParallelMoE(
            experts,
            num_experts=layer.num_experts,
            ep_size=plan.ep_size,
            dispatcher=dispatcher,
            slots=slots[number] if slots else None,
        )
        block = model.get_submodule(parent_name)
        setattr(block, attribute, moe)
        for name in _SHARED_EXPERT:
            if isinstance(shared_expert := getattr(block, name, None), nn.Module):
                moe.deepspeed_moe.shared_expert = EarlySharedExpert(block, shared_expert)
    return AdaptReport(tuple(swapped), ep_rank, plan.ep_size)


def shard_experts(
    model: nn.Module, ep_size: int, ep_rank: int, placement: SlotPlacement | None = None
) -> list[SwappedLayer]:
    """Cuts every experts module down to one rank's experts, in place; names do not change.

    Raises:
        AdapterError: See `adapt`.
    """
    if config := getattr(model, "config", None):
        check_supported(config)
    ep_plan = getattr(model, "ep_plan", {})
    found = [
        (name, module)
        for name, module in model.named_modules()
        if declares_contract(module) or ep_plan.get(re.sub(r"\d+", "*", name)) == _DISPATCHED
    ]
    if not found:
        raise AdapterError(
            f"{type(model).__name__} has no layer that follows transformers' experts contract, "
            f"so there is nothing to spread over ranks. {HOW_TO_UPCYCLE}."
        )
    if placement is None:
        return [
            _shard_module(name, module, ep_size, _contiguous(name, module, ep_size, ep_rank))
            for name, module in found
        ]
    _check_placement(placement, found, ep_size)
    return [
        _shard_module(name, module, ep_size, placement.local_experts(layer, ep_rank))
        for layer, (name, module) in zip(placement.moe_layers, found, strict=True)
    ]


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses a family that cannot be spread over ranks.

    Raises:
        AdapterError: With the reason and the way out.
    """
    if reason := UNSUPPORTED.get(config.model_type):
        raise AdapterError(f"{config.model_type} models cannot be spread over ranks: {reason}")


def check_ep_size(layer: str, num_experts: int, ep_size: int) -> None:
    """Refuses an ep_size that does not divide the experts of a layer.

    Raises:
        AdapterError: With those that do.
    """
    if num_experts % ep_size:
        raise AdapterError(f"{uneven_experts(ep_size, num_experts, layer)}.")


def bind_expert_groups(
    model: nn.Module,
    *,
    nodes: Sequence[int] | None = None,
    device: torch.device | None = None,
    timeout_s: float = 1800.0,
) -> None:
    """Gives every swapped layer its expert group; all ranks call it after `init_distributed`.

    Args:
        model: The adapted model.
        nodes: Node of every rank, for dispatch in two levels, and for memory that the ranks of a
            node share; by default there is one level, and no such memory.
        device: Where the model is to run. With it, a dispatcher that is ``auto`` measures the
            groups' links and chooses by them; without, it is alltoall.
        timeout_s: How long a rank waits for another at shared memory.

    Raises:
        ConfigError: The dispatcher needs two levels, and the ranks have not got them.
    """
    layers = moe_layers(model)
    for ep_size in sorted({layer.ep_size for layer in layers}):
        of_size = [layer.deepspeed_moe for layer in layers if layer.ep_size == ep_size]
        names = {experts.dispatcher_name for experts in of_size}
        ep_group, node_groups, shared, prices = create_expert_groups(ep_size), None, None, None
        if nodes and names & {"auto", *TWO_LEVEL}:
            node_groups = create_node_groups(ep_size, nodes)
        if nodes and ep_size > 1:
            shared = open_within_nodes(ep_group, node_groups, nodes, timeout_s=timeout_s)
        if device is not None and "auto" in names and ep_size > 1:
            links = make_links(ep_group, node_groups, shared=shared)
            first = next(layer for layer in layers if layer.ep_size == ep_size)
            prices = measure_links(links, device, first)
        for experts in of_size:
            experts.node_groups, experts.shared, experts.prices = node_groups, shared, prices
    for layer in layers:
        layer.set_deepspeed_parallelism()


def prepare_for_inference(model: nn.Module) -> None:
    """Lays the experts' weights out as a CPU reads them fastest; see `expert_gemm`."""
    for layer in moe_layers(model):
        lay_out_for_cpu(layer.deepspeed_moe.experts)


def moe_layers(model: nn.Module) -> list[ExpertParallelMoE]:
    """Returns the swapped layers in the order in which a forward pass meets them."""
    return [module for module in model.modules() if isinstance(module, ExpertParallelMoE)]


def _num_experts(module: nn.Module) -> int:
    """Returns the experts of a layer over all ranks, before or after it was cut."""
    return int(getattr(module, "num_global_experts", module.num_experts))


def _contiguous(name: str, module: nn.Module, ep_size: int, ep_rank: int) -> range:
    num_experts = _num_experts(module)
    check_ep_size(name, num_experts, ep_size)
    num_local = num_experts // ep_size
    return range(ep_rank * num_local, (ep_rank + 1) * num_local)


def _check_placement(
    placement: SlotPlacement, found: list[tuple[str, nn.Module]], ep_size: int
) -> None:
    """Refuses a placement that is not one of these layers and ranks."""
    wanted = [placement.num_experts] * len(placement.moe_layers)
    has = [_num_experts(module) for _, module in found]
    if has != wanted or placement.num_ranks != ep_size:
        raise AdapterError(
            f"the placement is of {len(wanted)} layers with {placement.num_experts} experts on "
            f"{placement.num_ranks} ranks; the model has {len(has)} with "
            f"{' or '.join(map(str, sorted(set(has))))}, and ep_size={ep_size}. Make one from a "
            "run of this model: ds-moe-ep balance."
        )


def _shard_module(name: str, module: nn.Module, ep_size: int, local: Sequence[int]) -> SwappedLayer:
    num_experts = _num_experts(module)
    if not hasattr(module, "num_global_experts"):
        for param_name, param in expert_parameters(module).items():
            # A copy, so that the memory of the other ranks' experts is given back.
            kept = param.detach()[list(local)]
            setattr(module, param_name, nn.Parameter(kept, requires_grad=param.requires_grad))
        module.num_global_experts = num_experts
        module.num_experts = len(local)
    elif module.num_experts != len(local):
        raise AdapterError(
            f"{name} was cut to {module.num_experts} experts a rank; ep_size={ep_size} needs "
            f"{len(local)}."
        )
    return SwappedLayer(name, type(module).__name__, num_experts, local)
