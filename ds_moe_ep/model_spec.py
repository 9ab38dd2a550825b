"""Translates a Hugging Face config.json into a `ModelSpec`; no other layer knows its field names.

What a family's blocks are made of is data, in model_families.py. No weights are read, and neither
torch nor transformers is imported.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ModelSpecError
from ds_moe_ep.hf_fields import HfFields
from ds_moe_ep.param_counts import num_dense_params, num_params_per_expert
from ds_moe_ep.upcycle_settings import UPCYCLE_FIELD, UpcycleSettings

__all__ = ["MLASpec", "ModelSpec", "model_spec_from_config", "read_model_spec"]

_KINDS_WITH_EXPERTS = ("sparse", "moe", "hash_moe")
_BYTES_PER_PARAM = {"bfloat16": 2, "float16": 2, "float32": 4}

# A number that damage to a file has made, as a list of layers, would take all memory.
_MOST_LAYERS = 100_000


@dataclass(frozen=True)
class MLASpec:
    """Sizes of multi-head latent attention; no q_lora_rank: queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int


@dataclass(frozen=True)
class ModelSpec:
    """What planning needs to know about a model, in this project's words.

    Attributes:
        name: folder or hub name, for display.
        model_type: Hugging Face's name of the family; of a multimodal model, the whole one's. All
            sizes below are then those of the language model in it.
        architecture: Hugging Face's name of the model class; empty if the config has none.
        num_layers: decoder layers; layers for multi-token prediction are not among them.
        moe_layers: indices of the layers with routed experts, ascending.
        hidden_size: width of the residual stream.
        intermediate_size: width of a dense MLP.
        moe_intermediate_size: width of one routed expert; 0 for a dense model.
        num_experts: routed experts of one MoE layer; 0 for a dense model.
        top_k: routed experts a token is sent to; 0 for a dense model.
        num_shared_experts: experts of one MoE layer that every token passes.
        shared_expert_intermediate_size: total width of the shared experts; 0 if there are none.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: width of one query or key head (with MLA: both its parts together).
        mla: sizes of multi-head latent attention, if the model has it.
        vocab_size: rows of the embedding.
        max_position_embeddings: longest context in tokens.
        tie_word_embeddings: whether embedding and output head are one matrix.
        dtype: "bfloat16", "float16" or "float32".
        num_dense_params: parameters of everything but the routed experts; routers are dense.
        num_params_per_expert: parameters of one routed expert of one layer.
        is_upcycled: whether its MoE layers are this package's, in place of a dense model's FFNs.
        params_are_exact: False where the family is unknown or the model multimodal, so that the
            counts are an estimate (without the encoders of images and sound).
    """

    name: str
    model_type: str
    architecture: str
    num_layers: int
    moe_layers: tuple[int, ...]
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_experts: int
    top_k: int
    num_shared_experts: int
    shared_expert_intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    mla: MLASpec | None
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    num_dense_params: int
    num_params_per_expert: int
    is_upcycled: bool = False
    params_are_exact: bool = True

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return bool(self.moe_layers)

    @property
    def num_expert_params(self) -> int:
        """Parameters of all routed experts of all layers."""
        return len(self.moe_layers) * self.num_experts * self.num_params_per_expert

    @property
    def num_params(self) -> int:
        """Parameters of the whole model, tied embeddings counted once."""
        return self.num_dense_params + self.num_expert_params

    @property
    def param_bytes(self) -> int:
        """Bytes of one parameter in `dtype`."""
        return _BYTES_PER_PARAM[self.dtype]


def read_model_spec(path: str | Path) -> ModelSpec:
    """Read the spec of a model directory or of a bare config.json.

    Args:
        path: a directory with a config.json, or a JSON file.

    Raises:
        ModelSpecError: with the file and the field at fault.
    """
    file = Path(path)
    try:
        if file.is_dir():
            file = file / "config.json"
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelSpecError(
            f"{file}: no such file. Name a model directory or its config.json; of a model on the "
            "hub, fetch the file first: hf download ORG/MODEL config.json --local-dir DIR"
        ) from None
    except OSError as error:
        raise ModelSpecError(f"{file}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ModelSpecError(f"{file}: not a JSON file ({error})") from None
    if not isinstance(config, dict):
        raise ModelSpecError(f"{file}: a JSON object is expected, not a {type(config).__name__}")
    return model_spec_from_config(config, source=str(file), name=file.resolve().parent.name)


def model_spec_from_config(config: Mapping[str, Any], *, source: str, name: str) -> ModelSpec:
    """Translate the content of a config.json.

    Args:
        config: the parsed file.
        source: path for messages.
        name: model name for display.

    Raises:
        ModelSpecError: with the field at fault and its value.
    """
    fields = HfFields(config, source)
    spec = _sizes(fields, name)
    if fields.upcycled is not None:
        spec = _with_experts(spec, fields.upcycled, source)
    return replace(
        spec,
        num_dense_params=num_dense_params(spec, fields),
        num_params_per_expert=num_params_per_expert(spec, fields),
    )


def _sizes(fields: HfFields, name: str) -> ModelSpec:
    """Return the spec without its parameter counts."""
    hidden_size = fields.integer("hidden_size")
    num_layers = fields.integer("num_layers", len(_layer_kinds(fields)) or None)
    if num_layers > _MOST_LAYERS:
        raise fields.refuse(fields.name("num_layers"), f"no model has over {_MOST_LAYERS:,} layers")
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        heads_field = fields.name("num_attention_heads")
        raise fields.refuse("num_key_value_heads", f"must divide {heads_field}={num_heads}")
    mla = _mla(fields)
    moe_layers = _moe_layers(fields, num_layers)
    num_experts, top_k = _experts(fields) if moe_layers else (0, 0)
    expert_width = _expert_width(fields) if moe_layers else 0
    num_shared, shared_width = _shared_experts(fields, expert_width) if moe_layers else (0, 0)
    return ModelSpec(
        name=name,
        model_type=fields.model_type,
        architecture=next(iter(fields.items("architectures", str)), ""),
        num_layers=num_layers,
        moe_layers=moe_layers,
        hidden_size=hidden_size,
        intermediate_size=_intermediate_size(fields, hidden_size, expert_width),
        moe_intermediate_size=expert_width,
        num_experts=num_experts,
        top_k=top_k,
        num_shared_experts=num_shared,
        shared_expert_intermediate_size=shared_width,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        head_dim=_head_dim(fields, mla, hidden_size, num_heads),
        mla=mla,
        vocab_size=fields.integer("vocab_size"),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        tie_word_embeddings=fields.switch(("tie_word_embeddings", fields.family.ties_embeddings)),
        dtype=_dtype(fields),
        num_dense_params=0,
        num_params_per_expert=0,
        params_are_exact=fields.is_known_family and not fields.is_nested,
    )


def _with_experts(dense: ModelSpec, upcycled: UpcycleSettings, source: str) -> ModelSpec:
    """Return the spec of an upcycled model from that of the dense one."""
    if dense.is_moe:
        raise ModelSpecError(
            f"{source}: {UPCYCLE_FIELD} is for dense models, but {dense.model_type} has experts of "
            "its own. Remove the field."
        )
    if upcycled.layers[-1] >= dense.num_layers:
        raise ModelSpecError(
            f"{source}: {UPCYCLE_FIELD}.layers={list(upcycled.layers)}: the model has "
            f"num_layers={dense.num_layers}, so the last one is layer {dense.num_layers - 1}"
        )
    if upcycled.method == "split" and dense.intermediate_size % upcycled.num_experts:
        raise ModelSpecError(
            f"{source}: {UPCYCLE_FIELD}.num_experts={upcycled.num_experts} does not divide "
            f"intermediate_size={dense.intermediate_size}, which method 'split' needs"
        )
    return replace(
        dense,
        moe_layers=upcycled.layers,
        num_experts=upcycled.num_experts,
        top_k=upcycled.top_k,
        moe_intermediate_size=upcycled.expert_width(dense.intermediate_size),
        is_upcycled=True,
    )


def _mla(fields: HfFields) -> MLASpec | None:
    has_mla = fields.family.has_mla
    if has_mla is None:
        has_mla = fields.has("kv_lora_rank")
    if not has_mla:
        return None
    # Here null is a value of its own; absent would mean whatever the config class has, which may
    # know no such field where the family is not known.
    has_q_lora = fields.has("q_lora_rank") or fields.is_known_family
    without_q_lora = fields.is_null("q_lora_rank") or not has_q_lora
    return MLASpec(
        q_lora_rank=None if without_q_lora else fields.integer("q_lora_rank"),
        kv_lora_rank=fields.integer("kv_lora_rank"),
        qk_nope_head_dim=fields.integer("qk_nope_head_dim"),
        qk_rope_head_dim=fields.integer("qk_rope_head_dim", minimum=0),  # 0: no positions
        v_head_dim=fields.integer("v_head_dim"),
    )


def _head_dim(fields: HfFields, mla: MLASpec | None, hidden_size: int, num_heads: int) -> int:
    if mla is not None:
        return mla.qk_nope_head_dim + mla.qk_rope_head_dim
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if head_dim == 0:
        hidden_field = fields.name("hidden_size")
        raise fields.refuse(
            fields.name("num_attention_heads"), f"more than {hidden_field}={hidden_size}"
        )
    return head_dim


def _moe_layers(fields: HfFields, num_layers: int) -> tuple[int, ...]:
    """Return the layers with routed experts, by the rules the family has for it."""
    family = fields.family
    has_experts = family.has_experts
    if has_experts is None:
        has_experts = fields.integer("num_experts", 0, minimum=0) > 0
    if not has_experts:
        return ()

    def setting(word: str, default: int, minimum: int = 0) -> int:
        if word in family.moe_layer_fields:
            return fields.integer(word, default, minimum=minimum)
        return family.defaults.get(word, default)

    if kinds := _layer_kinds(fields):
        if len(kinds) != num_layers:
            raise fields.refuse(
                "mlp_layer_types", f"must have one item for each of {num_layers} layers"
            )
        return tuple(layer for layer, kind in enumerate(kinds) if kind in _KINDS_WITH_EXPERTS)
    dense = (
        fields.items("mlp_only_layers", int) if "mlp_only_layers" in family.moe_layer_fields else []
    )
    first = setting("first_moe_layer", 0)
    last = setting("last_moe_layer", -1, minimum=-1)  # -1: the last layer of all
    interval = setting("moe_layer_interval", 1, minimum=1)
    offset = setting("moe_layer_offset", interval - 1)
    return tuple(
        layer
        for layer in range(first, num_layers if last == -1 else min(last + 1, num_layers))
        if layer % interval == offset % interval and layer not in dense
    )


def _layer_kinds(fields: HfFields) -> list[str]:
    """Return what each layer's MLP is, in Hugging Face's words; empty if the config has no list."""
    moe_layer_fields = fields.family.moe_layer_fields
    if "layers_block_type" in moe_layer_fields:
        # Older files have a letter for each layer instead.
        pattern = fields.text("hybrid_override_pattern") or ""
        return fields.items("layers_block_type", str) or [
            "moe" if letter == "E" else "other" for letter in pattern
        ]
    if "mlp_layer_types" in moe_layer_fields:
        return fields.items("mlp_layer_types", str)
    return []


def _experts(fields: HfFields) -> tuple[int, int]:
    """Return the number of routed experts and how many of them a token is sent to."""
    num_experts = fields.integer("num_experts")
    top_k = fields.integer("top_k", may_be_per_layer=True)
    if top_k > num_experts:
        experts_field = fields.name("num_experts")
        raise fields.refuse(fields.name("top_k"), f"more than {experts_field}={num_experts}")
    return num_experts, top_k


def _expert_width(fields: HfFields) -> int:
    width_field = fields.family.expert_width
    if width_field is None:
        has_own_field = fields.has("moe_intermediate_size")
        width_field = "moe_intermediate_size" if has_own_field else "intermediate_size"
    return fields.integer(width_field, may_be_per_layer=True)


def _shared_experts(fields: HfFields, expert_width: int) -> tuple[int, int]:
    """Return number and total width of the shared experts."""
    if fields.family.has_shared_expert_gate or fields.has("shared_expert_intermediate_size"):
        width = fields.integer("shared_expert_intermediate_size", minimum=0)
        num_shared = fields.integer(
            "num_shared_experts", 1 if width else 0, minimum=0, may_be_per_layer=True
        )
        return num_shared, num_shared * width
    num_shared = fields.integer("num_shared_experts", 0, minimum=0, may_be_per_layer=True)
    return num_shared, num_shared * expert_width


def _intermediate_size(fields: HfFields, hidden_size: int, expert_width: int) -> int:
    ratio = fields.family.intermediate_per_hidden
    # A model whose MLPs are all experts may have no width of its own for dense ones.
    default = ratio * hidden_size if ratio else expert_width
    return fields.integer("intermediate_size", default or None)


def _dtype(fields: HfFields) -> str:
    dtype = fields.text("dtype", "torch_dtype") or "float32"
    if dtype not in _BYTES_PER_PARAM:
        name = "dtype" if fields.has("dtype") else "torch_dtype"
        raise fields.refuse(name, f"one of {', '.join(_BYTES_PER_PARAM)} is needed")
    return dtype
