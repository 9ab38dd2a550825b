"""Layers for Megatron's `--spec ds_moe_ep.megatron.layer_specs NAME`, where its own do not fit.

`olmoe_layers`: OLMoE's norms of queries and keys, which span all heads. `mla_layers`: latent
attention as DeepSeek has it where Megatron's local layers, or its queries, differ.
Imports megatron-core; without a GPU, import it within `megatron_stand_ins`.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import get_backend
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

__all__ = [
    "CausalAttention",
    "DirectQueryAttention",
    "KeyNorm",
    "QueryNorm",
    "mla_layers",
    "olmoe_layers",
]


def olmoe_layers(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron's own layers with OLMoE's norms of queries and keys.

    Args:
        config: The model; with --qk-layernorm, and tensors that are not split.
        vp_stage: Stage of an interleaved pipeline.
    """

    def with_wide_norms(attention: Any) -> Any:
        parts = replace(attention.submodules, q_layernorm=QueryNorm, k_layernorm=KeyNorm)
        return replace(attention, submodules=parts)

    return _with_attention(default_layer_spec(config, vp_stage), with_wide_norms)


def mla_layers(config: GPTModelConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Returns Megatron's own layers with the parts of latent attention that they lack.

    Args:
        config: The model; with --multi-latent-attention.
        vp_stage: Stage of an interleaved pipeline.
    """

    def as_deepseek(attention: Any) -> Any:
        if config.transformer.transformer_impl == "local":
            parts = replace(attention.submodules, core_attention=CausalAttention)
            attention = replace(attention, submodules=parts)
        if config.transformer.q_lora_rank is None:
            attention = replace(attention, module=DirectQueryAttention)
        return attention

    return _with_attention(default_layer_spec(config, vp_stage), as_deepseek)


def _with_attention(
    block: TransformerBlockSubmodules, change: Callable[[Any], Any]
) -> TransformerBlockSubmodules:
    """Returns a block whose layers' attention is changed."""

    def changed(layer: Any) -> Any:
        attention = change(layer.submodules.self_attention)
        return replace(layer, submodules=replace(layer.submodules, self_attention=attention))

    return replace(block, layer_specs=[changed(layer) for layer in block.layer_specs])


class _NormOverHeads(torch.nn.RMSNorm):
    """A norm over all heads of a token together."""

    def forward(self, x_SBND: torch.Tensor) -> torch.Tensor:
        """Normalises [sequence, batch, heads, head width] over its last two dimensions."""
        return super().forward(x_SBND.flatten(-2)).view(x_SBND.shape)


class QueryNorm(_NormOverHeads):
    """The norm of all query heads."""

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__(hidden_size * config.num_attention_heads, eps=eps)


class KeyNorm(_NormOverHeads):
    """The norm of all key heads."""

    def __init__(self, hidden_size: int, config: Any, eps: float) -> None:
        super().__init__(hidden_size * config.num_query_groups, eps=eps)


class DirectQueryAttention(MLASelfAttention):
    """Latent attention of keys and values alone: queries are projected directly, without a norm.

    Megatron's own has norms of both or of none; --qk-layernorm is then the one of keys and values.
    """

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        backend = get_backend(self.config.transformer_impl)
        linear = backend.column_parallel_linear()
        return {
            "linear_q_proj": linear,
            "linear_q_up_proj": IdentityOp,
            "linear_kv_up_proj": linear,
            "q_layernorm": IdentityOp,
            "kv_layernorm": backend.layer_norm(rms_norm=True, for_qk=True),
        }


class CausalAttention(torch.nn.Module):
    """Scaled dot product attention whose values may be wider or narrower than its keys.

    Megatron's local `DotProductAttention` does not take the widths that its latent attention hands
    to it. Whole sequences only: there is no cache of earlier keys.
    """

    def __init__(self, *, softmax_scale: float, **unused: object) -> None:
        """Takes what Megatron's latent attention gives; heads are counted when called."""
        super().__init__()
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query_SBND: torch.Tensor,
        key_SBND: torch.Tensor,
        value_SBNV: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        **unused: object,
    ) -> torch.Tensor:
        """Returns the values that each token attends to, [sequence, batch, heads * value width].

        Args:
            query_SBND: [sequence, batch, heads, key width].
            key_SBND: The same shape.
            value_SBNV: [sequence, batch, heads, value width].
            attention_mask: True where a token must not look, [batch, 1, sequence, sequence]; None
                for what comes after it.
            attn_mask_type: Megatron's word for the mask.
            unused: Packed sequences and the like, which must not be there.
        """
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBND, value_SBNV))
        out_BNSV = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None and attn_mask_type == AttnMaskType.causal,
            scale=self.softmax_scale,
        )
        return out_BNSV.permute(2, 0, 1, 3).flatten(-2)
