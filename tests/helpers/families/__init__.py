"""Tiny random models of every supported MoE family, with every parameter away from zero.

A family is data, in the modules beside this: small, but with the features of its config class, like
dense layers in between, shared experts, biases, groups, latent attention, sinks, windows. Families
are called by their model_type.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from tests.helpers.families.attention import ATTENTION
from tests.helpers.families.core import CORE
from tests.helpers.families.hybrid import HYBRID
from tests.helpers.families.multimodal import MULTIMODAL
from tests.helpers.families.settings import COMMON, NUM_EXPERTS, VOCAB_SIZE

__all__ = [
    "CORE_FAMILIES",
    "FAMILIES",
    "NUM_EXPERTS",
    "UNKNOWN_FAMILIES",
    "VOCAB_SIZE",
    "auto_class",
    "build_tiny",
    "save_tiny",
]

_SETTINGS = {
    **{name: {**COMMON, **settings} for name, settings in (CORE | ATTENTION | HYBRID).items()},
    **MULTIMODAL,
}

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    name: partial(AutoConfig.for_model, name, **settings)
    for name, settings in _SETTINGS.items()
    if name in CONFIG_MAPPING
}
"""A tiny config for each family that the installed transformers has, by model_type."""

UNKNOWN_FAMILIES: tuple[str, ...] = tuple(sorted(_SETTINGS.keys() - FAMILIES.keys()))
"""Families that an older transformers does not have."""

CORE_FAMILIES: tuple[str, ...] = tuple(CORE)
"""The families that are also launched end to end."""


def auto_class(config: PreTrainedConfig) -> Any:
    """Returns transformers' auto class for text in, text out: the causal one where there is one."""
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def build_tiny(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Builds a random model whose norms, biases, sinks and correction biases are random too.

    Args:
        family: Its model_type.
        seed: Of the weights.
        **changes: Fields of the config with other values than the tiny one has.
    """
    torch.manual_seed(seed)
    config = FAMILIES[family](**changes)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):  # experts by token id: any two, but never one twice
                rows = [torch.randperm(NUM_EXPERTS)[: tensor.shape[1]] for _ in tensor]
                tensor.copy_(torch.stack(rows))
            if not tensor.is_floating_point():
                continue
            # Norm weights and scalars around what they start from (1, or 0 where the norm adds 1
            # itself), the rest around 0: wide enough for the logits to differ clearly, but no
            # wider, because large values that cancel make float32 noise of their own.
            noise = torch.randn(tensor.shape)
            is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("scalar")
            tensor.copy_(0.1 * noise + tensor if is_scale else 0.1 * noise)
            if name.endswith("balancing_biases"):
                tensor[-1] = -1.0  # transformers sets it so, whatever the checkpoint says
    return model.eval()


def save_tiny(family: str, folder: Path, *, seed: int = 0) -> PreTrainedModel:
    """Builds a tiny model, writes it as a Hugging Face model directory, and returns it."""
    model = build_tiny(family, seed=seed)
    model.save_pretrained(folder)
    return model
