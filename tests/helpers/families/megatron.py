"""Tiny configs of the families that can be converted for Megatron, as it computes them."""

from typing import Any

__all__ = ["MEGATRON_CASES"]

_YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 40,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
_V2_LITE = {
    "topk_method": "greedy",
    "q_lora_rank": None,
    "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707},
}
# Groups are ranked as Hugging Face does with two experts of each that is kept only.
_V3 = {"num_experts_per_tok": 4, "routed_scaling_factor": 1.5}

MEGATRON_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "olmoe, one expert a rank at EP4": ("olmoe", {"num_experts": 4}),
    "olmoe, a key for every query": ("olmoe", {"num_key_value_heads": 4}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2_moe": ("qwen2_moe", {}),  # a dense layer between two with experts
    "qwen3_moe": ("qwen3_moe", {}),  # tied embeddings
    "qwen3_moe, not normalised": ("qwen3_moe", {"norm_topk_prob": False}),
    "deepseek_v2, in groups": ("deepseek_v2", {}),
    "deepseek_v2, like V2-Lite": ("deepseek_v2", _V2_LITE),
    "deepseek_v3": ("deepseek_v3", _V3),
    "deepseek_v3, stretched": ("deepseek_v3", _V3 | {"rope_parameters": _YARN}),
}
"""Name to family and what differs from its tiny config."""
