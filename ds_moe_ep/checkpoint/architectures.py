"""MoE families of transformers that compute what a dense one does, but for experts as FFNs.

An upcycled model of such a family is an ordinary Hugging Face model. Only what was compared part by
part is in the table; a config that the MoE family cannot express is refused, with the field.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ds_moe_ep.errors import AdapterError
from ds_moe_ep.upcycle_settings import UpcycleSettings

__all__ = ["MoeArchitecture", "architecture_for", "moe_config"]


@dataclass(frozen=True)
class MoeArchitecture:
    """How an MoE family spells what a dense one has.

    Attributes:
        model_type: Its name.
        block: Name of the MoE block in a layer, on disk.
        matrices: Names of an expert's gate, up and down matrix.
        config: Fields of its config that are the same for every upcycled model.
        config_sizes: Its field -> ours, of `UpcycleSettings` or the expert's `width`.
        keeps_dense_layers: Whether some layers may have no experts.
        needs: Field of the dense config -> the only value that it can express.
        needs_equal_attention: Whether a sliding window is for all layers or for none.
        has_empty_shared_expert: Whether every layer has a shared expert, here of width 0.
    """

    model_type: str
    block: str = "mlp"
    matrices: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    config: Mapping[str, Any] = field(default_factory=dict)
    config_sizes: Mapping[str, str] = field(default_factory=dict)
    keeps_dense_layers: bool = False
    needs: Mapping[str, Any] = field(default_factory=dict)
    needs_equal_attention: bool = False
    has_empty_shared_expert: bool = False


# Attention, norms and rotary embedding of Mixtral are Mistral's, and Llama's where that has no
# biases; it normalises the weights of the chosen experts by itself.
_MIXTRAL = MoeArchitecture(
    "mixtral",
    block="block_sparse_moe",
    matrices=("w1", "w3", "w2"),
    config_sizes={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "top_k",
        "intermediate_size": "width",
    },
)
_QWEN_SIZES = {
    "num_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_intermediate_size": "width",
}
_ARCHITECTURES = {
    "llama": replace(_MIXTRAL, needs={"attention_bias": False, "mlp_bias": False}),
    "mistral": _MIXTRAL,
    # A shared expert of width 0 adds exactly 0.
    "qwen2": MoeArchitecture(
        "qwen2_moe",
        config={"norm_topk_prob": True, "shared_expert_intermediate_size": 0, "qkv_bias": True},
        config_sizes=_QWEN_SIZES,
        keeps_dense_layers=True,
        has_empty_shared_expert=True,
    ),
    "qwen3": MoeArchitecture(
        "qwen3_moe",
        config={"norm_topk_prob": True},
        config_sizes=_QWEN_SIZES,
        keeps_dense_layers=True,
        needs_equal_attention=True,
    ),
    # Not OLMoE, whose norms stand before the blocks: FlexOlmo has OLMo2's layers.
    "olmo2": MoeArchitecture(
        "flex_olmo",
        config={"norm_topk_prob": True},
        config_sizes={
            "num_experts": "num_experts",
            "num_experts_per_tok": "top_k",
            "intermediate_size": "width",
        },
    ),
}
# What transformers writes into every config.json, for the class it is of.
_OF_THE_CLASS = ("architectures", "model_type", "transformers_version")
# One is an alias of the other, and which one transformers writes differs from family to family.
_NUM_EXPERTS = ("num_experts", "num_local_experts")
_WAY_OUT = "Write an expert-sharded checkpoint instead, which launch/infer.py runs: --to ep"


def architecture_for(config: PreTrainedConfig, settings: UpcycleSettings) -> MoeArchitecture:
    """Returns the MoE family that an upcycled model is an ordinary model of.

    Args:
        config: The dense model's.
        settings: What it is made.

    Raises:
        AdapterError: There is none, or it cannot express a field of the config or dense layers.
    """
    dense_type = config.model_type
    found = _ARCHITECTURES.get(dense_type)
    if found is None:
        raise AdapterError(
            f"--to hf: transformers has no MoE family that is known to compute what "
            f"{dense_type} does; there is one for {', '.join(_ARCHITECTURES)}. {_WAY_OUT}."
        )
    for name, value in found.needs.items():
        if (actual := getattr(config, name, value)) != value:
            raise AdapterError(
                f"--to hf: {name}={actual!r} of this {dense_type} model cannot be expressed in "
                f"{found.model_type}, which has {name}={value!r}. {_WAY_OUT}."
            )
    kinds = set(getattr(config, "layer_types", None) or [])
    if found.needs_equal_attention and len(kinds) > 1:
        raise AdapterError(
            f"--to hf: layer_types of this {dense_type} model are {', '.join(sorted(kinds))}, but "
            f"in {found.model_type} all layers attend alike. {_WAY_OUT}."
        )
    num_layers = config.num_hidden_layers
    if len(settings.layers) < num_layers and not found.keeps_dense_layers:
        raise AdapterError(
            f"--to hf: {num_layers - len(settings.layers)} of {num_layers} layers are to stay "
            f"dense, but every layer of {found.model_type} has experts. Leave --every and --layers "
            f"out. {_WAY_OUT}."
        )
    return found


def moe_config(
    config: PreTrainedConfig,
    architecture: MoeArchitecture,
    settings: UpcycleSettings,
    width: int,
) -> str:
    """Returns the config.json of an upcycled model of a real MoE family.

    Args:
        config: The dense model's.
        architecture: The MoE family.
        settings: What it is made.
        width: Width of an expert.
    """
    target = type(AutoConfig.for_model(architecture.model_type))
    # What the dense family does not know, it ignores; where the MoE family knows it, it would not.
    left_out = {*_OF_THE_CLASS, *architecture.needs, *(_names(target) - _names(type(config)))}
    kept = {name: value for name, value in config.to_dict().items() if name not in left_out}
    sizes = {"num_experts": settings.num_experts, "top_k": settings.top_k, "width": width}
    own: dict[str, Any] = {name: sizes[ours] for name, ours in architecture.config_sizes.items()}
    if architecture.keeps_dense_layers:
        own["mlp_only_layers"] = [
            layer for layer in range(config.num_hidden_layers) if layer not in settings.layers
        ]
    own |= architecture.config
    new = target(**{**kept, **own})
    new.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[architecture.model_type]]
    # What transformers would save, and also what is the default of its class: other programs, and
    # other versions, have other defaults. They know the number of experts by its usual name only.
    content = json.loads(new.to_json_string())
    every = json.loads(new.to_json_string(use_diff=False))
    usual = _names(target) - _names(PreTrainedConfig)
    content |= {name: value for name, value in every.items() if name in usual} | own
    content = {
        name: value
        for name, value in content.items()
        if not name.startswith("_") and (name in own or name not in _NUM_EXPERTS)
    }
    return f"{json.dumps(content, indent=2, sort_keys=True)}\n"


def _names(config_class: type[PreTrainedConfig]) -> set[str]:
    """Returns the fields that a class of configs knows."""
    return set(config_class().to_dict())
