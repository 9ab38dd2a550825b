"""Swaps the experts of a Hugging Face model for expert-parallel DeepSpeed MoE layers."""

from ds_moe_ep.adapter.replace import (
    AdaptReport,
    adapt,
    bind_expert_groups,
    moe_layers,
    prepare_for_inference,
    shard_experts,
)

__all__ = [
    "AdaptReport",
    "adapt",
    "bind_expert_groups",
    "moe_layers",
    "prepare_for_inference",
    "shard_experts",
]
