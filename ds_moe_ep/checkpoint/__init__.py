"""Reads Hugging Face checkpoints so that a rank loads its dense weights and its own experts, and nothing else."""

from ds_moe_ep.checkpoint.load import load_expert_parallel_model

__all__ = ["load_expert_parallel_model"]
