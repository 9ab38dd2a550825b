"""What the blocks of each Hugging Face model family are made of, as data and nothing else.

A family here is what transformers builds for a `model_type`. Sizes are read from config.json; the
defaults in this table are those of transformers' config classes for fields that are left out there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

__all__ = [
    "FAMILIES",
    "FIELD_NAMES",
    "NO_PADDING",
    "OTHER_FAMILIES",
    "UNKNOWN_FAMILY",
    "UNSUPPORTED",
    "Family",
    "Switch",
]

Switch = bool | tuple[str, bool]
"""Whether a part is there: fixed, or (field that switches it, value where the field is absent)."""

FIELD_NAMES: dict[str, tuple[str, ...]] = {
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "ffn_dim", "n_inner"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_k",
        "moe_topk",
        "top_k_experts",
    ),
    "num_shared_experts": ("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"),
    "shared_expert_intermediate_size": (
        "shared_expert_intermediate_size",
        "shared_experts_intermediate_size",
        "moe_shared_expert_intermediate_size",
        "shared_intermediate_size",
    ),
    "expert_hidden_size": ("moe_latent_size", "moe_hidden_size"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "embedding_size": ("word_embed_proj_dim",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions", "model_max_length"),
    "first_moe_layer": ("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"),
    "last_moe_layer": ("moe_layer_end_index",),
    "moe_layer_interval": ("decoder_sparse_step", "moe_layer_interval", "expert_layer_period"),
    "moe_layer_offset": ("expert_layer_offset",),
}
"""This project's word for a size -> Hugging Face's names; other words are the same in both."""


@dataclass(frozen=True)
class Family:
    """The parts of a model family that its sizes alone do not tell.

    Attributes:
        has_experts: whether some layers have routed experts; None: if the config says how many.
        expert_width: the field with the width of one routed expert; None: whichever is there.
        moe_layer_fields: the settings that choose the MoE layers; without any, all layers are.
        has_mla: whether it has multi-head latent attention; None: if there is a kv_lora_rank.
        defaults: sizes where the config does not say, by this project's word.
        intermediate_per_hidden: intermediate_size / hidden_size where the config does not say.
        norm_has_bias: LayerNorm (weight and bias) instead of RMSNorm (weight).
        norm_has_weight: whether norms have parameters at all.
        norms_per_layer: norms over hidden_size in one layer.
        qk_norm: what one norm of queries or keys spans.
        mlp_is_gated: gate, up and down projection instead of up and down.
        position_rows: rows of the position table beyond max_position_embeddings; None: no table.
        router_has_correction_bias: a score correction that is a parameter, not a buffer.
    """

    has_experts: bool | None = False
    expert_width: Literal["intermediate_size", "moe_intermediate_size"] | None = None
    moe_layer_fields: tuple[str, ...] = ()
    has_mla: bool | None = False
    defaults: Mapping[str, int] = field(default_factory=dict)
    intermediate_per_hidden: int | None = None
    norm_has_bias: bool = False
    norm_has_weight: Switch = True
    norms_per_layer: int = 2
    has_final_norm: Switch = True
    has_qk_norm: Switch = False
    qk_norm: Literal["head", "projection"] = "head"
    qkv_has_bias: Switch = False
    attention_output_has_bias: Switch = False
    has_sinks: bool = False
    mlp_is_gated: bool = True
    mlp_has_bias: Switch = False
    expert_has_bias: bool = False
    router_has_bias: bool = False
    router_has_correction_bias: bool = False
    has_shared_expert_gate: bool = False
    position_rows: int | None = None
    lm_head_has_bias: Switch = False
    ties_embeddings: bool = False


_ATTENTION_BIAS = ("attention_bias", False)

FAMILIES: dict[str, Family] = {
    "olmoe": Family(
        has_experts=True,
        expert_width="intermediate_size",
        has_qk_norm=True,
        qk_norm="projection",
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "mixtral": Family(
        has_experts=True,
        expert_width="intermediate_size",
        defaults={"num_key_value_heads": 8},
    ),
    "qwen2_moe": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("moe_layer_interval", "mlp_only_layers"),
        defaults={"num_key_value_heads": 16},
        qkv_has_bias=("qkv_bias", True),
        has_shared_expert_gate=True,
    ),
    "qwen3_moe": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("moe_layer_interval", "mlp_only_layers"),
        defaults={"num_key_value_heads": 4},
        has_qk_norm=True,
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "deepseek_v2": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("first_moe_layer",),
        has_mla=True,
        defaults={"num_shared_experts": 2},
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        mlp_has_bias=("mlp_bias", False),
    ),
    "deepseek_v3": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("first_moe_layer",),
        has_mla=True,
        defaults={"num_shared_experts": 1, "first_moe_layer": 3},
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "ernie4_5_moe": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("first_moe_layer", "last_moe_layer", "moe_layer_interval"),
        defaults={"num_key_value_heads": 4, "num_shared_experts": 2, "first_moe_layer": 1},
        qkv_has_bias=("use_bias", False),
        attention_output_has_bias=("use_bias", False),
        mlp_has_bias=("use_bias", False),
        lm_head_has_bias=("use_bias", False),
        router_has_correction_bias=True,
        ties_embeddings=True,
    ),
    "glm4_moe": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("first_moe_layer",),
        defaults={"num_key_value_heads": 8, "num_shared_experts": 1, "first_moe_layer": 1},
        has_qk_norm=("use_qk_norm", False),
        qkv_has_bias=_ATTENTION_BIAS,
    ),
    "glm4_moe_lite": Family(
        has_experts=True,
        expert_width="moe_intermediate_size",
        moe_layer_fields=("mlp_layer_types",),
        has_mla=True,
        defaults={"num_shared_experts": 1, "first_moe_layer": 1},
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "gpt_oss": Family(
        has_experts=True,
        expert_width="intermediate_size",
        defaults={"num_key_value_heads": 8, "head_dim": 64},
        qkv_has_bias=("attention_bias", True),
        attention_output_has_bias=("attention_bias", True),
        has_sinks=True,
        expert_has_bias=True,
        router_has_bias=True,
    ),
    "granitemoe": Family(
        has_experts=True,
        expert_width="intermediate_size",
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "phimoe": Family(
        has_experts=True,
        expert_width="intermediate_size",
        defaults={"num_key_value_heads": 8},
        norm_has_bias=True,
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        lm_head_has_bias=("lm_head_bias", False),
    ),
    "llama": Family(
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        mlp_has_bias=("mlp_bias", False),
    ),
    "mistral": Family(defaults={"num_key_value_heads": 8}),
    "qwen2": Family(defaults={"num_key_value_heads": 32}, qkv_has_bias=True),
    "qwen3": Family(
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        has_qk_norm=True,
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "gemma": Family(
        defaults={"num_key_value_heads": 16, "head_dim": 256},
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        ties_embeddings=True,
    ),
    "gemma2": Family(
        defaults={"num_key_value_heads": 4, "head_dim": 256},
        norms_per_layer=4,
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        ties_embeddings=True,
    ),
    "gemma3_text": Family(
        defaults={"num_key_value_heads": 4, "head_dim": 256},
        norms_per_layer=4,
        has_qk_norm=True,
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
        ties_embeddings=True,
    ),
    "olmo2": Family(
        has_qk_norm=True,
        qk_norm="projection",
        qkv_has_bias=_ATTENTION_BIAS,
        attention_output_has_bias=_ATTENTION_BIAS,
    ),
    "gpt2": Family(
        intermediate_per_hidden=4,
        norm_has_bias=True,
        qkv_has_bias=True,
        attention_output_has_bias=True,
        mlp_is_gated=False,
        mlp_has_bias=True,
        position_rows=0,
        ties_embeddings=True,
    ),
    "gpt_neox": Family(
        norm_has_bias=True,
        qkv_has_bias=("attention_bias", True),
        attention_output_has_bias=("attention_bias", True),
        mlp_is_gated=False,
        mlp_has_bias=True,
    ),
    "opt": Family(
        norm_has_bias=True,
        norm_has_weight=("layer_norm_elementwise_affine", True),
        has_final_norm=("do_layer_norm_before", True),
        qkv_has_bias=("enable_bias", True),
        attention_output_has_bias=("enable_bias", True),
        mlp_is_gated=False,
        mlp_has_bias=("enable_bias", True),
        position_rows=2,
        ties_embeddings=True,
    ),
    "phi": Family(
        norm_has_bias=True,
        norms_per_layer=1,
        has_qk_norm=("qk_layernorm", False),
        qkv_has_bias=True,
        attention_output_has_bias=True,
        mlp_is_gated=False,
        mlp_has_bias=True,
        lm_head_has_bias=True,
    ),
    "phi3": Family(),
}
"""model_type -> family. Their parameter counts are exact: a test builds each with transformers."""

UNKNOWN_FAMILY = Family(
    has_experts=None,
    moe_layer_fields=(
        "first_moe_layer",
        "last_moe_layer",
        "moe_layer_interval",
        "moe_layer_offset",
        "mlp_only_layers",
        "mlp_layer_types",
    ),
    has_mla=None,
    qkv_has_bias=_ATTENTION_BIAS,
    attention_output_has_bias=_ATTENTION_BIAS,
    mlp_has_bias=("mlp_bias", False),
)
"""The block most models have; with it, parameter counts are an estimate."""

OTHER_FAMILIES: dict[str, Family] = {
    "nemotron_h": replace(
        UNKNOWN_FAMILY, moe_layer_fields=("layers_block_type",), mlp_is_gated=False
    ),
}
"""model_type -> family that is not quite the usual block; counts are an estimate here too."""

NO_PADDING = frozenset({"deepseek_v4", "minimax_m3_vl", "minimax_m3_vl_text"})
"""Families whose attention picks blocks of tokens by their place in a row, padding included."""

_RUN_AS_IT_IS = "Run it with transformers itself."
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("llama4", "llama4_text"),
        "every expert is given every token, scaled by the router beforehand, so there is no "
        f"routing to dispatch by. {_RUN_AS_IT_IS}",
    ),
    **dict.fromkeys(
        ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
        "each layer has experts for text and others for images, which the checkpoint keeps in one "
        "list and of which text meets only the first. Use the text model, ernie4_5_moe.",
    ),
    "diffusion_gemma": (
        f"it writes whole blocks by diffusion, not one token after another. {_RUN_AS_IT_IS}"
    ),
    "openai_privacy_filter": f"it labels tokens and generates no text. {_RUN_AS_IT_IS}",
    "qwen3_omni_moe": (
        "it is a model that writes and another that speaks, each with experts of its own. Save "
        "its thinker as a model directory (model_type qwen3_omni_moe_thinker) and use that."
    ),
}
"""model_type -> why its experts cannot be spread over ranks, and what to do instead."""
