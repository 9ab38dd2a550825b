"""What Megatron calls the tensors of a model, and which rows of which Hugging Face tensors each is.

Every Megatron tensor is some rows of Hugging Face tensors, one below the other, so bytes are only
moved: there is nothing to calculate in either direction. Where the bytes lie is decided elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ds_moe_ep.config.megatron import megatron_args
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import MLASpec, ModelSpec
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "MegatronLayout",
    "MegatronTensor",
    "Rows",
    "TargetSpec",
    "check_convertible",
    "extra_states",
    "megatron_tensors",
    "possible_layouts",
]

TargetSpec = Literal["local", "te"]
"""Which of Megatron's layer specs a checkpoint is for; they name some of the norms differently."""


@dataclass(frozen=True)
class Rows:
    """Rows of dimension 0 of a Hugging Face tensor."""

    tensor: str
    rows: range


@dataclass(frozen=True)
class MegatronTensor:
    """A tensor of Megatron, or a layer's or an expert's place in a larger one.

    Attributes:
        key: Its name in a checkpoint, where layers may be stacked in one tensor, as experts are.
        index: Its place in the leading dimensions: of layers, if they are stacked, and of experts.
        leading: The sizes of these dimensions.
        parts: What it consists of, in the order of its rows.
    """

    key: str
    index: tuple[int, ...]
    leading: tuple[int, ...]
    parts: tuple[Rows, ...]

    @property
    def num_rows(self) -> int:
        """How many rows it has."""
        return sum(len(part.rows) for part in self.parts)


@dataclass(frozen=True)
class MegatronLayout:
    """What the names depend on beside the model.

    Attributes:
        target_spec: Megatron's own layers (local), or those of Transformer Engine (te).
        stacked: Whether the layers are rows of one tensor. Megatron does so unless it was given a
            list of which layers have experts.
    """

    target_spec: TargetSpec
    stacked: bool


@dataclass(frozen=True)
class _Family:
    """How Hugging Face names what Megatron has in the layers of a family."""

    block: str = "mlp"
    gate_up_down: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_experts: str | None = None
    has_shared_expert_gate: bool = False
    has_router_bias: bool = False
    qk_norm: Literal["per head", "of all heads"] | None = None


_FAMILIES = {
    "deepseek_v2": _Family(shared_experts="shared_experts"),
    "deepseek_v3": _Family(shared_experts="shared_experts", has_router_bias=True),
    "mixtral": _Family(block="block_sparse_moe", gate_up_down=("w1", "w3", "w2")),
    "olmoe": _Family(qk_norm="of all heads"),
    "qwen2_moe": _Family(shared_experts="shared_expert", has_shared_expert_gate=True),
    "qwen3_moe": _Family(qk_norm="per head"),
}


def check_convertible(spec: ModelSpec, config: Mapping[str, Any]) -> None:
    """Refuses a model that Megatron would not compute as Hugging Face does.

    Args:
        spec: The model.
        config: Its config.json.

    Raises:
        ConfigError: Names the field, or the families that can be converted.
    """
    megatron_args(ParallelPlan(1), spec, config)
    if spec.model_type not in _FAMILIES:
        raise ConfigError(
            f"model_type={spec.model_type!r}: its tensors are not known by Megatron's names; those "
            f"of {', '.join(_FAMILIES)} are."
        )
    shared = _FAMILIES[spec.model_type].shared_experts
    if shared and spec.shared_expert_intermediate_size == 0:
        raise ConfigError(
            f"the shared expert of this {spec.model_type} model has width 0, which Megatron cannot "
            "express. Its checkpoint would lack the tensors of it."
        )


def possible_layouts(spec: ModelSpec) -> list[MegatronLayout]:
    """Returns how a model's checkpoint may be laid out, the one that is written first.

    Args:
        spec: The model. Its layers can be stacked only if they all have experts.
    """
    is_uniform = len(spec.moe_layers) == spec.num_layers
    specs: tuple[TargetSpec, ...] = ("local", "te")
    return [
        MegatronLayout(target_spec, stacked)
        for stacked in ([True, False] if is_uniform else [False])
        for target_spec in specs
    ]


def megatron_tensors(
    spec: ModelSpec, config: Mapping[str, Any], layout: MegatronLayout
) -> list[MegatronTensor]:
    """Returns all tensors of a model, layer by layer.

    Args:
        spec: The model; see `check_convertible`.
        config: Its config.json.
        layout: How they are laid out.
    """
    vocabulary, hidden = range(spec.vocab_size), range(spec.hidden_size)
    of_model = {
        "embedding.word_embeddings.weight": Rows("model.embed_tokens.weight", vocabulary),
        "decoder.final_layernorm.weight": Rows("model.norm.weight", hidden),
    }
    if not spec.tie_word_embeddings:
        of_model["output_layer.weight"] = Rows("lm_head.weight", vocabulary)
    tensors = [MegatronTensor(key, (), (), (rows,)) for key, rows in of_model.items()]
    for layer in range(spec.num_layers):
        prefix = "decoder.layers." if layout.stacked else f"decoder.layers.{layer}."
        index: tuple[int, ...] = (layer,) if layout.stacked else ()
        leading: tuple[int, ...] = (spec.num_layers,) if layout.stacked else ()
        for name, parts in _of_layer(spec, config, layout.target_spec, layer):
            tensors.append(MegatronTensor(prefix + name, index, leading, parts))
        if layer in spec.moe_layers:
            for name, expert, parts in _of_experts(spec, layer):
                place = (*index, expert), (*leading, spec.num_experts)
                tensors.append(MegatronTensor(prefix + name, *place, parts))
    return tensors


_Named = tuple[str, tuple[Rows, ...]]
"""The name of a tensor in its layer, and what it consists of."""


def _of_layer(
    spec: ModelSpec, config: Mapping[str, Any], target_spec: TargetSpec, layer: int
) -> Iterator[_Named]:
    """Yields the tensors of a layer but those of its routed experts."""
    hf, hidden = f"model.layers.{layer}.", range(spec.hidden_size)
    has_experts = layer in spec.moe_layers
    norms = _norm_names(spec, target_spec, has_experts=has_experts)
    yield norms["input"], (Rows(f"{hf}input_layernorm.weight", hidden),)
    attention = f"{hf}self_attn."
    yield "self_attention.linear_proj.weight", (Rows(f"{attention}o_proj.weight", hidden),)
    if spec.mla is not None:
        yield from _latent_attention(spec, spec.mla, norms, attention)
    else:
        yield from _attention(spec, config, attention)
    yield norms["post_attention"], (Rows(f"{hf}post_attention_layernorm.weight", hidden),)
    family = _FAMILIES[spec.model_type]
    block = f"{hf}{family.block}."
    if not has_experts:
        yield from _ffn("mlp", block, family.gate_up_down, spec.intermediate_size, spec.hidden_size)
        return
    experts = range(spec.num_experts)
    yield "mlp.router.weight", (Rows(f"{block}gate.weight", experts),)
    if family.has_router_bias:
        yield "mlp.router.expert_bias", (Rows(f"{block}gate.e_score_correction_bias", experts),)
    if family.shared_experts:
        width, shared = spec.shared_expert_intermediate_size, f"{block}{family.shared_experts}."
        yield from _ffn("mlp.shared_experts", shared, family.gate_up_down, width, spec.hidden_size)
    if family.has_shared_expert_gate:
        gate = Rows(f"{block}shared_expert_gate.weight", range(1))
        yield "mlp.shared_experts.gate_weight", (gate,)


def _of_experts(spec: ModelSpec, layer: int) -> Iterator[tuple[str, int, tuple[Rows, ...]]]:
    """Yields the name, the expert and the parts of each tensor of a layer's routed experts.

    Grouped GEMMs have the same names: Megatron makes either checkpoint loadable by the other.
    """
    family = _FAMILIES[spec.model_type]
    for expert in range(spec.num_experts):
        hf = f"model.layers.{layer}.{family.block}.experts.{expert}."
        width, hidden = spec.moe_intermediate_size, spec.hidden_size
        for name, parts in _ffn("mlp.experts.experts", hf, family.gate_up_down, width, hidden):
            yield name, expert, parts


def _ffn(
    name: str, hf: str, gate_up_down: tuple[str, str, str], width: int, hidden_size: int
) -> Iterator[_Named]:
    gate, up, down = gate_up_down
    gate_and_up = tuple(Rows(f"{hf}{matrix}.weight", range(width)) for matrix in (gate, up))
    yield f"{name}.linear_fc1.weight", gate_and_up
    yield f"{name}.linear_fc2.weight", (Rows(f"{hf}{down}.weight", range(hidden_size)),)


def _attention(spec: ModelSpec, config: Mapping[str, Any], hf: str) -> Iterator[_Named]:
    kinds = ["weight"]
    if spec.model_type == "qwen2_moe" and config.get("qkv_bias", True):
        kinds.append("bias")
    for kind in kinds:
        yield f"self_attention.linear_qkv.{kind}", tuple(_interleaved(spec, hf, kind))
    qk_norm = _FAMILIES[spec.model_type].qk_norm
    if qk_norm is None:
        return
    for name, num_heads in (("q", spec.num_attention_heads), ("k", spec.num_key_value_heads)):
        num_rows = spec.head_dim * (1 if qk_norm == "per head" else num_heads)
        norm = Rows(f"{hf}{name}_norm.weight", range(num_rows))
        yield f"self_attention.{name}_layernorm.weight", (norm,)


def _interleaved(spec: ModelSpec, hf: str, kind: str) -> Iterator[Rows]:
    """Yields q, k and v group by group: the query heads of a group, then its key and its value."""
    heads_per_group = spec.num_attention_heads // spec.num_key_value_heads
    for group in range(spec.num_key_value_heads):
        for name, num_heads in (("q", heads_per_group), ("k", 1), ("v", 1)):
            num_rows = num_heads * spec.head_dim
            rows = range(group * num_rows, (group + 1) * num_rows)
            yield Rows(f"{hf}{name}_proj.{kind}", rows)


def _latent_attention(
    spec: ModelSpec, mla: MLASpec, norms: Mapping[str, str], hf: str
) -> Iterator[_Named]:
    heads, of_key_value = spec.num_attention_heads, mla.qk_nope_head_dim + mla.v_head_dim
    of_query = heads * spec.head_dim
    sizes = {
        "linear_kv_down_proj.weight": (
            "kv_a_proj_with_mqa",
            mla.kv_lora_rank + mla.qk_rope_head_dim,
        ),
        "linear_kv_up_proj.weight": ("kv_b_proj", heads * of_key_value),
        norms["kv"]: ("kv_a_layernorm", mla.kv_lora_rank),
    }
    if mla.q_lora_rank is None:
        sizes["linear_q_proj.weight"] = ("q_proj", of_query)
    else:
        sizes["linear_q_down_proj.weight"] = ("q_a_proj", mla.q_lora_rank)
        sizes["linear_q_up_proj.weight"] = ("q_b_proj", of_query)
        sizes[norms["q"]] = ("q_a_layernorm", mla.q_lora_rank)
    for name, (module, num_rows) in sizes.items():
        yield f"self_attention.{name}", (Rows(f"{hf}{module}.weight", range(num_rows)),)


def _norm_names(spec: ModelSpec, target_spec: TargetSpec, *, has_experts: bool) -> dict[str, str]:
    """Returns what the norms of a layer are called.

    Transformer Engine has a norm and the matrix after it in one module, and Megatron's own layers
    are renamed to the same in checkpoints; both only for some norms.

    Source: core/models/gpt/gpt_layer_specs.py of megatron-core 0.19.2.
    """
    is_te, is_latent = target_spec == "te", spec.mla is not None
    # Of queries without a latent the layers are this package's, with the norm by itself.
    inside_up = is_te and spec.mla is not None and spec.mla.q_lora_rank is not None
    inside_fc1 = not has_experts if is_te else not is_latent
    return {
        "input": "input_layernorm.weight"
        if is_latent
        else "self_attention.linear_qkv.layer_norm_weight",
        "post_attention": "mlp.linear_fc1.layer_norm_weight"
        if inside_fc1
        else "pre_mlp_layernorm.weight",
        "q": "linear_q_up_proj.layer_norm_weight" if inside_up else "q_layernorm.weight",
        "kv": "linear_kv_up_proj.layer_norm_weight" if inside_up else "kv_layernorm.weight",
    }


_HAS_EXTRA_STATE = {
    "local": re.compile(r"(.*\.linear_\w+)\.weight"),
    # Which of its norms have one changed with Transformer Engine's versions.
    "te": re.compile(r"(.*\.(?:linear_\w+|\w+_layernorm|final_layernorm))\.weight"),
}


def extra_states(tensors: Iterable[MegatronTensor], layout: MegatronLayout) -> list[str]:
    """Returns the names of the empty objects that Megatron looks for beside the tensors.

    Args:
        tensors: All tensors of a model.
        layout: How they are laid out.
    """
    found = []
    for tensor in tensors:
        if match := _HAS_EXTRA_STATE[layout.target_spec].fullmatch(tensor.key):
            modules = [match[1]]
            if layout.target_spec == "te" and match[1].endswith("self_attention.linear_proj"):
                modules.append(match[1].replace("linear_proj", "core_attention"))
            place = ".".join(map(str, tensor.index or (0,)))
            places = ".".join(map(str, tensor.leading or (1,)))
            found += [f"{module}._extra_state/shard_{place}_{places}" for module in modules]
    return found
