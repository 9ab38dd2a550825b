"""Tiny random models of the supported MoE families, with every parameter away from zero.

Small on purpose, but with the features of their families: dense layers in between, shared experts,
biases, groups, MLA, sinks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

__all__ = ["FAMILIES", "NUM_EXPERTS", "VOCAB_SIZE", "build_tiny", "save_tiny"]

NUM_EXPERTS = 8
VOCAB_SIZE = 96

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def _config(class_name: str, **fields: Any) -> Callable[[], transformers.PreTrainedConfig]:
    return lambda: getattr(transformers, class_name)(**{**_COMMON, **fields})


FAMILIES: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "olmoe": _config("OlmoeConfig", intermediate_size=24, num_experts=NUM_EXPERTS),
    "mixtral": _config(
        "MixtralConfig", intermediate_size=24, num_local_experts=NUM_EXPERTS, sliding_window=16
    ),
    "qwen2_moe": _config(
        "Qwen2MoeConfig",
        intermediate_size=40,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        num_experts=NUM_EXPERTS,
        mlp_only_layers=[1],
    ),
    "qwen3_moe": _config(
        "Qwen3MoeConfig",
        intermediate_size=40,
        moe_intermediate_size=24,
        head_dim=12,
        num_experts=NUM_EXPERTS,
        mlp_only_layers=[0],
        norm_topk_prob=True,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": _config(
        "DeepseekV2Config",
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=2,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        topk_method="group_limited_greedy",
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.5,
        **_MLA,
    ),
    "deepseek_v3": _config(
        "DeepseekV3Config",
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        n_group=4,
        topk_group=2,
        num_experts_per_tok=3,
        **_MLA,
    ),
    "ernie4_5_moe": _config(
        "Ernie4_5_MoeConfig",
        intermediate_size=40,
        moe_intermediate_size=24,
        moe_num_experts=NUM_EXPERTS,
        moe_k=2,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=2,
    ),
    "glm4_moe": _config(
        "Glm4MoeConfig",
        intermediate_size=40,
        moe_intermediate_size=24,
        head_dim=8,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=1,
        topk_group=1,
        use_qk_norm=True,
        attention_bias=True,
    ),
    "glm4_moe_lite": _config(
        "Glm4MoeLiteConfig",
        intermediate_size=40,
        moe_intermediate_size=24,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        num_key_value_heads=4,
        n_group=1,
        topk_group=1,
        mlp_layer_types=["dense", "sparse", "sparse"],
        **_MLA,
    ),
    "gpt_oss": _config(
        "GptOssConfig",
        intermediate_size=24,
        head_dim=8,
        num_local_experts=NUM_EXPERTS,
        sliding_window=8,
    ),
    "granitemoe": _config("GraniteMoeConfig", intermediate_size=24, num_local_experts=NUM_EXPERTS),
    "phimoe": _config(
        "PhimoeConfig", intermediate_size=24, num_local_experts=NUM_EXPERTS, sliding_window=16
    ),
}
"""A tiny config for each family, by model_type."""


def build_tiny(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Builds a random model whose norms, biases, sinks and correction biases are random too."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            # Norm weights around 1, the rest around 0, wide enough for the logits to differ
            # clearly.
            noise = torch.randn(tensor.shape)
            tensor.copy_(
                1.0 + 0.1 * noise if "norm" in name and name.endswith("weight") else 0.15 * noise
            )
    return model.eval()


def save_tiny(family: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Builds a tiny model, writes it as a Hugging Face model directory, and returns it."""
    model = build_tiny(family, seed=seed)
    model.save_pretrained(folder)
    return model
