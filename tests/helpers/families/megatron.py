"""Tiny configs of the families that can be converted for Megatron, as it computes them."""

from typing import Any

__all__ = ["MEGATRON_CASES"]

MEGATRON_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "mixtral": ("mixtral", {"sliding_window": None}),
    "qwen2_moe": ("qwen2_moe", {}),  # a dense layer between two with experts
    "qwen3_moe": ("qwen3_moe", {}),  # tied embeddings
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v2, like V2-Lite": ("deepseek_v2", {"topk_method": "greedy", "q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", {"num_experts_per_tok": 4}),
}
"""Name to family and what differs from its tiny config."""
