"""Tiny random dense models of the families that are upcycled, with every parameter away from zero.

They have the features of their config classes that an upcycled model must keep: biases, fewer
key heads, tied embeddings, sliding windows, scaled rotary frequencies, dropout.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["DENSE_FAMILIES", "FFN_WIDTH", "NUM_LAYERS", "VOCAB_SIZE", "build_dense", "save_dense"]

VOCAB_SIZE, FFN_WIDTH, NUM_LAYERS = 40, 32, 3

_COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_FFN = {**_COMMON, "intermediate_size": FFN_WIDTH}
_GROUPED = {**_FFN, "num_key_value_heads": 1}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}

DENSE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "head_dim": 12, "rope_parameters": _LLAMA3_ROPE},
    "mistral": {**_GROUPED, "head_dim": 8, "sliding_window": 4, "rms_norm_eps": 1e-4},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": {**_GROUPED, "head_dim": 12, "attention_bias": True},
    "gemma": {**_GROUPED, "head_dim": 8},
    "gemma2": {**_GROUPED, "head_dim": 8, "sliding_window": 4},
    "gemma3_text": {**_GROUPED, "head_dim": 8, "sliding_window": 4},
    "olmo2": {**_FFN, "num_key_value_heads": 1},
    "gpt2": _COMMON | {"n_inner": FFN_WIDTH, "n_positions": 64},
    "gpt_neox": _FFN,
    "opt": {**_COMMON, "ffn_dim": FFN_WIDTH, "word_embed_proj_dim": 16},
    "phi": _GROUPED,
    "phi3": _GROUPED,
}
"""Settings of a tiny config of each family that is upcycled by name, by model_type."""


def build_dense(family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Builds a random model.

    Args:
        family: Its model_type; of a family that is not in `DENSE_FAMILIES` the config is the usual.
        seed: What its weights are drawn from.
        **settings: Fields of its config that are to be other than usual.
    """
    usual = DENSE_FAMILIES.get(family, _GROUPED)
    config = AutoConfig.for_model(family, **{**usual, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.2 * torch.randn(parameter.shape, generator=generator)
            is_scale = "norm" in name and name.endswith("weight")
            parameter.copy_(parameter + noise if is_scale else noise)
    return model.eval()


def save_dense(family: str, folder: Path, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Builds a random model, writes it as a Hugging Face directory, and returns it."""
    model = build_dense(family, seed=seed, **settings)
    model.save_pretrained(folder)
    return model
