"""Names what is special about a tiny model, as read from its config and its modules."""

from collections.abc import Iterator

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ds_moe_ep.model_spec import ModelSpec

__all__ = ["features"]


def features(model: PreTrainedModel, experts: nn.Module, spec: ModelSpec) -> list[str]:
    """Returns the features a model exercises, in a fixed order.

    Args:
        model: Hugging Face's model.
        experts: One of its experts modules.
        spec: What config.json says of it.
    """
    text = model.config.get_text_config(decoder=True)
    return [*_of_layers(text, spec), *_of_experts(experts, spec), *_of_router(model, text)]


def _of_layers(text: PreTrainedConfig, spec: ModelSpec) -> Iterator[str]:
    kinds = {*(getattr(text, "layer_types", None) or [])}
    if any("sliding" in kind for kind in kinds) or (
        not kinds and getattr(text, "sliding_window", None)
    ):
        yield "sliding window"
    if spec.mla is not None:
        yield "latent attention"
    if getattr(text, "index_topk", None) or getattr(text, "indexer_budget", None):
        yield "sparse attention"
    if {"linear_attention", "conv", "mamba"} & kinds or hasattr(text, "mamba_d_state"):
        yield "hybrid layers"
    if len(spec.moe_layers) < spec.num_layers:
        yield "dense layers"
    if spec.tie_word_embeddings:
        yield "tied embeddings"


def _of_experts(experts: nn.Module, spec: ModelSpec) -> Iterator[str]:
    if spec.num_shared_experts:
        yield "shared experts"
    if not hasattr(experts, "has_gate"):
        yield "experts outside the contract"  # declared by the expert-parallel plan alone
        return
    if experts.has_bias:
        yield "expert biases"
    if experts.is_transposed:
        yield "transposed"
    if not experts.is_concatenated:
        yield "interleaved"
    if not experts.has_gate:
        yield "experts without gate"
    if experts.has_post_expert_norm:
        yield "norm behind experts"
    if experts.down_proj.shape[-1 if experts.is_transposed else -2] != spec.hidden_size:
        yield "experts narrower than the model"


def _of_router(model: PreTrainedModel, text: PreTrainedConfig) -> Iterator[str]:
    names = model.state_dict()
    if any("correction_bias" in name or "balancing_biases" in name for name in names):
        yield "correction bias"
    if (getattr(text, "n_group", None) or 1) > 1:
        yield "groups"
    if "hash_moe" in (getattr(text, "mlp_layer_types", None) or []):
        yield "routing by token id"
