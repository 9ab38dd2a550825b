"""Tiny sizes that many families share; a family's own settings are in the modules beside this."""

from typing import Any

__all__ = [
    "COMMON",
    "DENSE_FIRST",
    "GATED_DELTA",
    "GROUPS",
    "INDEXER",
    "KIMI_DELTA",
    "LINEAR_AND_FULL",
    "MLA",
    "NUM_EXPERTS",
    "SLIDING",
    "VOCAB_SIZE",
    "WIDTHS",
    "Settings",
]

Settings = dict[str, Any]
"""Fields of a transformers config."""

NUM_EXPERTS = 8
VOCAB_SIZE = 96

COMMON: Settings = {
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
"""What every language model below has unless it says otherwise."""

WIDTHS: Settings = {"intermediate_size": 40, "moe_intermediate_size": 24}
GROUPS: Settings = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}
DENSE_FIRST: Settings = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
SLIDING: Settings = {
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": 8,
}
MLA: Settings = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
INDEXER: Settings = {"index_topk": 4, "index_head_dim": 8, "index_n_heads": 2}
LINEAR_AND_FULL: Settings = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"]
}
GATED_DELTA: Settings = {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
KIMI_DELTA: Settings = {"linear_head_dim": 8, "linear_num_heads": 4, "linear_conv_kernel_dim": 4}
