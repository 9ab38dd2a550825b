"""Counts a model's parameters from its sizes and its family's parts, as transformers builds them.

Buffers are not parameters: rotary tables and most score correction biases are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ds_moe_ep.hf_fields import HfFields

if TYPE_CHECKING:  # model_spec.py calls this module
    from ds_moe_ep.model_spec import MLASpec, ModelSpec

__all__ = ["num_dense_params", "num_params_per_expert"]


def num_params_per_expert(spec: ModelSpec, fields: HfFields) -> int:
    """Return the parameters of one routed expert of one layer, 0 for a dense model."""
    if not spec.moe_layers:
        return 0
    family = fields.family
    hidden_size = fields.integer("expert_hidden_size", spec.hidden_size)
    has_bias = fields.switch(family.mlp_has_bias) if spec.is_upcycled else family.expert_has_bias
    return _num_mlp_params(hidden_size, spec.moe_intermediate_size, family.mlp_is_gated, has_bias)


def num_dense_params(spec: ModelSpec, fields: HfFields) -> int:
    """Return the parameters of everything but the routed experts.

    Args:
        spec: sizes of the model; its own counts are not read.
        fields: the config.json they came from.

    Raises:
        ModelSpecError: if a field that switches a part is malformed.
    """
    family, hidden_size = fields.family, spec.hidden_size
    norm = hidden_size * _num_params_per_norm_channel(fields)
    mlp_has_bias = fields.switch(family.mlp_has_bias)

    def mlp(width: int) -> int:
        return _num_mlp_params(hidden_size, width, family.mlp_is_gated, mlp_has_bias)

    router = spec.num_experts * (
        hidden_size + family.router_has_bias + family.router_has_correction_bias
    )
    shared = mlp(spec.shared_expert_intermediate_size) if spec.num_shared_experts else 0
    shared += hidden_size if family.has_shared_expert_gate else 0
    num_moe_layers = len(spec.moe_layers)
    return (
        _num_embedding_params(spec, fields)
        + spec.num_layers * (_num_attention_params(spec, fields) + family.norms_per_layer * norm)
        + (spec.num_layers - num_moe_layers) * mlp(spec.intermediate_size)
        + num_moe_layers * (router + shared)
        + (norm if fields.switch(family.has_final_norm) else 0)
    )


def _num_params_per_norm_channel(fields: HfFields) -> int:
    if not fields.switch(fields.family.norm_has_weight):
        return 0
    return 2 if fields.family.norm_has_bias else 1


def _num_embedding_params(spec: ModelSpec, fields: HfFields) -> int:
    """Return the parameters of token and position embeddings, and of the output head."""
    family, hidden_size = fields.family, spec.hidden_size
    width = fields.integer("embedding_size", hidden_size)
    num_params = spec.vocab_size * width * (1 if spec.tie_word_embeddings else 2)
    if width != hidden_size:
        num_params += 2 * width * hidden_size  # projections into the residual stream and out of it
    if fields.switch(family.lm_head_has_bias):
        num_params += spec.vocab_size
    if family.position_rows is not None:
        num_params += (spec.max_position_embeddings + family.position_rows) * hidden_size
    return num_params


def _num_attention_params(spec: ModelSpec, fields: HfFields) -> int:
    """Return the parameters of one layer's attention, its q/k norms included."""
    family, hidden_size = fields.family, spec.hidden_size
    qkv_has_bias = fields.switch(family.qkv_has_bias)
    output_bias = hidden_size if fields.switch(family.attention_output_has_bias) else 0
    if spec.mla is not None:
        return _num_mla_params(spec, spec.mla, qkv_has_bias) + output_bias
    q_width = spec.num_attention_heads * spec.head_dim
    kv_width = spec.num_key_value_heads * spec.head_dim
    num_params = 2 * hidden_size * (q_width + kv_width) + output_bias
    if qkv_has_bias:
        num_params += q_width + 2 * kv_width
    if family.has_sinks:
        num_params += spec.num_attention_heads
    if fields.switch(family.has_qk_norm):
        channels = q_width + kv_width if family.qk_norm == "projection" else 2 * spec.head_dim
        num_params += channels * _num_params_per_norm_channel(fields)
    return num_params


def _num_mla_params(spec: ModelSpec, mla: MLASpec, low_rank_has_bias: bool) -> int:
    """Return the parameters of one layer's latent attention, less the output projection's bias."""
    hidden_size, num_heads = spec.hidden_size, spec.num_attention_heads
    q_width = num_heads * spec.head_dim
    kv_rank, kv_down = mla.kv_lora_rank, mla.kv_lora_rank + mla.qk_rope_head_dim
    if mla.q_lora_rank is None:
        num_params = hidden_size * q_width
    else:
        num_params = mla.q_lora_rank * (hidden_size + 1 + q_width)  # down, norm, up
        num_params += mla.q_lora_rank if low_rank_has_bias else 0
    num_params += hidden_size * kv_down + (kv_down if low_rank_has_bias else 0)
    num_params += kv_rank + kv_rank * num_heads * (mla.qk_nope_head_dim + mla.v_head_dim)
    return num_params + num_heads * mla.v_head_dim * hidden_size


def _num_mlp_params(hidden_size: int, width: int, is_gated: bool, has_bias: bool) -> int:
    num_up = 2 if is_gated else 1
    bias = num_up * width + hidden_size if has_bias else 0
    return (num_up + 1) * hidden_size * width + bias
