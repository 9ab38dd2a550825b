"""Bytes that a rank needs: its weights, the KV cache of its prompts, the tensors of a pass.

It is arithmetic on a model's sizes; what there is of memory is measured elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.placement import make_placement
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "BatchNeeds",
    "kv_bytes_per_token",
    "largest_batch",
    "room_bytes",
    "share_wanted",
    "weight_bytes",
]

# Tensors of the width of the residual stream that are held beside a layer's widest step: the stream
# itself, its norm, and what of the batch lies around the layers.
_WIDTHS_HELD = 4
# A row that a rank receives is held, and for part of the time its sum, which goes back.
_ROWS_HELD = 1.5
# Bytes held for each that is alive: what is freed lies in pieces, as the KV cache grows in the
# holes between temporary tensors. On CPUs measured: processes of 2, 4 and 8 ranks held 1.8 to 2.7
# times what torch's profiler saw alive at the peak. For GPUs assumed.
_HELD_ON_CPU, _HELD_ON_GPU = 2.2, 1.7
# Logits are kept in the model's type and, to choose a token or score one, in float32.
_FLOAT32_BYTES = 4
# Left free: fragments, the libraries' work space, what other processes take meanwhile.
_MARGIN = 0.1


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
        ep_size: int,
        prompt_tokens: int,
        new_tokens: int,
        element_bytes: int,
        on_gpu: bool,
        dispatcher: str = "alltoall",
    ) -> BatchNeeds:
        """Return the needs of a prompt.

        Args:
            spec: the model.
            ep_size: ranks that share the experts, and bring as many prompts each.
            prompt_tokens: its tokens.
            new_tokens: tokens to be generated; 0 is scoring, which keeps the logits of all tokens
                and no cache.
            element_bytes: bytes of a number at run time.
            on_gpu: whether tensors come from torch's allocator for GPUs, not from the C library,
                and experts compute in shapes that do not depend on the routing.
            dispatcher: how rows travel: with allgather, those of all ranks come to each, not those
                alone that chose its experts.
        """
        num_logits = prompt_tokens if new_tokens == 0 else 1
        logits = num_logits * spec.vocab_size * (element_bytes + _FLOAT32_BYTES)
        cached_tokens = prompt_tokens + new_tokens if new_tokens else 0
        gathers = dispatcher.startswith("allgather")
        numbers = _widest_step(spec, ep_size, on_gpu=on_gpu, gathers=gathers)
        held = numbers * (_HELD_ON_GPU if on_gpu else _HELD_ON_CPU)
        return cls(
            kv_bytes=cached_tokens * kv_bytes_per_token(spec, element_bytes),
            pass_bytes=int(prompt_tokens * held * element_bytes) + logits,
        )


def _widest_step(spec: ModelSpec, ep_size: int, *, on_gpu: bool, gathers: bool) -> float:
    """Return the numbers that are alive for a token at the widest step of its widest layer."""
    hidden, width = spec.hidden_size, spec.moe_intermediate_size
    dense = 3 * spec.intermediate_size if len(spec.moe_layers) < spec.num_layers else 0
    routed = 0.0
    if spec.is_moe:
        num_local_experts = spec.num_experts // ep_size
        wanted = share_wanted(spec.num_experts, num_local_experts, spec.top_k)
        rows = ep_size * (1.0 if gathers else wanted)
        # Pairs of a row and an expert: those that were chosen, or as many as there may be.
        pairs = float(spec.top_k)
        if on_gpu:
            pairs = rows * (1 if num_local_experts == 1 else spec.top_k)
        # Of a pair: gate and up, and their product, next to what they are of; or the row, the
        # product and the output.
        of_pairs = pairs * max(hidden + 4 * width, 2 * hidden + width)
        shared = 3 * spec.shared_expert_intermediate_size
        routed = _ROWS_HELD * rows * hidden + of_pairs + shared
    return _WIDTHS_HELD * hidden + max(dense, routed)


def share_wanted(num_experts: int, num_local_experts: int, top_k: int) -> float:
    """Return how likely a token wants any of a rank's experts, if all are chosen equally.

    Args:
        num_experts: experts over all ranks.
        num_local_experts: experts of the rank, or of whatever group of ranks is asked about.
        top_k: experts that the token chooses.
    """
    return 1.0 - comb(num_experts - num_local_experts, top_k) / comb(num_experts, top_k)


def room_bytes(free_bytes: float) -> int:
    """Return what batches may take of what is free after loading: all but a margin."""
    return int(free_bytes * (1 - _MARGIN))


def largest_batch(room_bytes: int, needs: BatchNeeds) -> int:
    """Return how many prompts of these needs fit; 0 if none does."""
    return max(0, room_bytes) // max(1, needs.num_bytes)
