"""Writes a small model with the structure of a large one, from its config.json alone.

Layers, experts, routing and everything else that decides which rank computes what are kept; widths
shrink, and weights are random.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

from ds_moe_ep.config.strict import read_json
from ds_moe_ep.errors import ModelSpecError
from ds_moe_ep.model_families import FIELD_NAMES

__all__ = ["shrink_config", "write_small_model"]

_NUM_HEADS = 4
_HEAD_DIM = 16
# The widest that is kept, by this project's word where it has one.
_WIDTHS = {
    "vocab_size": 512,
    "hidden_size": _NUM_HEADS * _HEAD_DIM,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_attention_heads": _NUM_HEADS,
    "head_dim": _HEAD_DIM,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": _HEAD_DIM,
    "qk_rope_head_dim": _HEAD_DIM,
    "v_head_dim": _HEAD_DIM,
}
# Weights are stored otherwise, or read by code that a new config does not have.
_LEFT_OUT = ("quantization_config", "auto_map", "torch_dtype", "architectures")
_SPREAD = 0.1  # of norms and biases


def shrink_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config with the same structure and small widths.

    Args:
        config: The content of a config.json.
    """
    small = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    for word, most in _WIDTHS.items():
        for name in FIELD_NAMES.get(word, (word,)):
            if isinstance(small.get(name), int):
                small[name] = min(small[name], most)
    if config.get("num_key_value_heads"):
        # As many as heads, some heads to each, or one for all: whichever it was.
        groups = config["num_attention_heads"] // config["num_key_value_heads"]
        small["num_key_value_heads"] = max(1, small["num_attention_heads"] // min(groups, 2))
        if config["num_key_value_heads"] == 1:
            small["num_key_value_heads"] = 1
    for name in small:
        if name.endswith("_token_id"):  # no token ends a prompt of random words
            small[name] = None
    return {**small, "dtype": "float32"}


def write_small_model(config_json: Path, folder: Path) -> int:
    """Writes a shrunk model with seeded random weights in float32 as a Hugging Face directory.

    Args:
        config_json: The config.json to start from.
        folder: Where to write.

    Returns:
        Its number of parameters.

    Raises:
        ModelSpecError: It is no causal language model that transformers knows.
    """
    config = read_json(config_json)
    model_type = config["model_type"]
    kind = CONFIG_MAPPING[model_type] if model_type in CONFIG_MAPPING else None
    if kind is None or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelSpecError(
            f"{config_json}: model_type={model_type!r} is no causal language model of "
            "transformers, and only those can be made small. Rehearse with one of "
            "configs/*/config.json, which has the same experts."
        )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind.from_dict(shrink_config(config)))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                # Matrices that keep the size of what they multiply; norms and biases near theirs.
                spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else _SPREAD
                offset = tensor if tensor.dim() == 1 else 0.0
                tensor.copy_(spread * torch.randn(tensor.shape) + offset)
    model.save_pretrained(folder)
    return sum(param.numel() for param in model.parameters())
