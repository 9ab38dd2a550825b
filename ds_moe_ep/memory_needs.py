"""Bytes that a rank needs: its weights, the KV cache of its prompts, the tensors of a pass.

It is arithmetic on a model's sizes; what there is of memory is measured elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.placement import make_placement
from ds_moe_ep.plan import ParallelPlan

__all__ = ["BatchNeeds", "kv_bytes_per_token", "largest_batch", "weight_bytes"]

# Tensors of the width of the residual stream that a pass holds at a time: its input, its norm,
# queries, keys, values, their rotated copies, attention's output, and the sum.
_WIDTHS_HELD = 10
# Logits are kept in the model's type and, to choose a token or score one, in float32.
_FLOAT32_BYTES = 4


def weight_bytes(spec: ModelSpec, plan: ParallelPlan, element_bytes: int) -> int:
    """Return the bytes of the weights of one rank with tp_size = pp_size = 1.

    Args:
        spec: the model.
        plan: the parallel sizes.
        element_bytes: bytes of one weight at run time.
    """
    num_local = make_placement(plan, spec).num_local_experts if spec.is_moe else 0
    num_expert_params = len(spec.moe_layers) * num_local * spec.num_params_per_expert
    return (spec.num_dense_params + num_expert_params) * element_bytes


def kv_bytes_per_token(spec: ModelSpec, element_bytes: int) -> int:
    """Return the bytes that the KV cache grows by with each token of a prompt, at most.

    transformers caches whole heads, or of latent attention the latents. Layers with a window, or
    without attention, need less.

    Args:
        spec: the model.
        element_bytes: bytes of one number in the cache.
    """
    if spec.mla is not None:
        width = spec.mla.kv_lora_rank + spec.mla.qk_rope_head_dim
    else:
        width = 2 * spec.num_key_value_heads * spec.head_dim
    return spec.num_layers * width * element_bytes


@dataclass(frozen=True)
class BatchNeeds:
    """What one more prompt in a batch takes on its rank.

    Attributes:
        kv_bytes: its KV cache, when it is longest.
        pass_bytes: the tensors of the widest pass, estimated.
    """

    kv_bytes: int
    pass_bytes: int

    @property
    def num_bytes(self) -> int:
        """Both together."""
        return self.kv_bytes + self.pass_bytes

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        *,
        prompt_tokens: int,
        new_tokens: int,
        element_bytes: int,
    ) -> BatchNeeds:
        """Return the needs of a prompt.

        Args:
            spec: the model.
            prompt_tokens: its tokens.
            new_tokens: tokens to be generated; 0 is scoring, which keeps the logits of all tokens
                and no cache.
            element_bytes: bytes of a number at run time.
        """
        num_logits = prompt_tokens if new_tokens == 0 else 1
        # As many rows come from other ranks as go to them if routing is even; twice that is held.
        routed = 2 * spec.top_k * (2 * spec.hidden_size + 3 * spec.moe_intermediate_size)
        widths = _WIDTHS_HELD * spec.hidden_size + 3 * spec.intermediate_size + routed
        logits = num_logits * spec.vocab_size * (element_bytes + _FLOAT32_BYTES)
        cached_tokens = prompt_tokens + new_tokens if new_tokens else 0
        return cls(
            kv_bytes=cached_tokens * kv_bytes_per_token(spec, element_bytes),
            pass_bytes=prompt_tokens * widths * element_bytes + logits,
        )


def largest_batch(room_bytes: int, needs: BatchNeeds) -> int:
    """Return how many prompts of these needs fit; 0 if none does."""
    return max(0, room_bytes) // max(1, needs.num_bytes)
