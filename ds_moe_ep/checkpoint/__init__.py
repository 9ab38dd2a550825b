"""Reads of a Hugging Face checkpoint what one rank needs: dense weights and its own experts."""

from ds_moe_ep.checkpoint.load import load_expert_parallel_model

__all__ = ["load_expert_parallel_model"]
