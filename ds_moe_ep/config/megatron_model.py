"""Maps a model onto Megatron's arguments: sizes, attention, positions, experts and routing.

What a family's config.json may say at all is in megatron_fields.py. Only mappings whose logits were
compared with Hugging Face's are here.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from ds_moe_ep.config.megatron_fields import check_fields
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec

__all__ = ["TRANSFORMER_IMPLS", "Args", "TransformerImpl", "model_arguments"]

Args = dict[str, object]
"""Argument name to its value. True is an argument without a value; False and None are none."""

TransformerImpl = Literal["transformer_engine", "local"]
TRANSFORMER_IMPLS: tuple[TransformerImpl, ...] = ("transformer_engine", "local")
"""Whose layers Megatron uses: Transformer Engine's, or its own, which need no GPU."""

HfConfig = Mapping[str, Any]

_LAYER_SPECS = "ds_moe_ep.megatron.layer_specs"


def model_arguments(
    spec: ModelSpec, config: HfConfig, *, transformer_impl: TransformerImpl
) -> Args:
    """Return the arguments that say what the model computes.

    Args:
        spec: the model.
        config: its config.json, for what does not change sizes and so is not in `spec`.
        transformer_impl: whose layers compute it.

    Raises:
        ConfigError: if the family has no checked mapping, or Megatron computes something else than
            Hugging Face for a value in `config`.
    """
    family = _FAMILIES.get(spec.model_type)
    if family is None or spec.is_upcycled:
        raise ConfigError(
            f"model_type={spec.model_type!r}{' with upcycled experts' if spec.is_upcycled else ''} "
            "has no mapping to Megatron that was checked against Hugging Face; there is one for "
            f"{', '.join(_FAMILIES)}."
        )
    check_fields(spec.model_type, config)
    own = family(spec, config)
    return {
        **_decoder(spec, config),
        **_experts(spec),
        **own,
        **_layers(spec, transformer_impl),
        **_precision(spec),
    }


def _layers(spec: ModelSpec, transformer_impl: TransformerImpl) -> Args:
    """Return whose layers are used, and ours where none of Megatron's computes the model."""
    is_local = transformer_impl == "local"
    own = None
    if spec.model_type == "olmoe":
        own = "olmoe_layers"
    elif spec.mla is not None and (is_local or spec.mla.q_lora_rank is None):
        own = "mla_layers"
    return {
        "--transformer-impl": transformer_impl,
        "--spec": own and f"{_LAYER_SPECS} {own}",
        # Kernels of Transformer Engine or apex, which the local layers ask for all the same.
        "--no-persist-layer-norm": is_local,
        "--no-gradient-accumulation-fusion": is_local,
        "--no-masked-softmax-fusion": is_local,
        "--no-rope-fusion": is_local,
    }


def _decoder(spec: ModelSpec, config: HfConfig) -> Args:
    """Return what Llama-like decoders share."""
    grouped = spec.num_key_value_heads != spec.num_attention_heads and spec.mla is None
    return {
        "--num-layers": spec.num_layers,
        "--hidden-size": spec.hidden_size,
        "--ffn-hidden-size": _number(config, "intermediate_size"),
        "--num-attention-heads": spec.num_attention_heads,
        "--kv-channels": spec.head_dim if spec.mla is None else None,
        "--group-query-attention": grouped,
        "--num-query-groups": spec.num_key_value_heads if grouped else None,
        "--padded-vocab-size": spec.vocab_size,
        "--max-position-embeddings": spec.max_position_embeddings,
        "--seq-length": min(4096, spec.max_position_embeddings),
        "--micro-batch-size": 1,
        "--normalization": "RMSNorm",
        "--norm-epsilon": _number(config, "rms_norm_eps"),
        "--position-embedding-type": "rope",
        **_rotary(spec, config),
        "--swiglu": True,
        "--disable-bias-linear": True,
        "--untie-embeddings-and-output-weights": not spec.tie_word_embeddings,
        "--attention-dropout": _number(config, "attention_dropout", 0.0),
        "--hidden-dropout": 0.0,
    }


def _experts(spec: ModelSpec) -> Args:
    return {
        "--num-experts": spec.num_experts,
        "--moe-router-topk": spec.top_k,
        "--moe-ffn-hidden-size": spec.moe_intermediate_size,
        "--moe-layer-freq": _layer_pattern(spec),
        "--moe-shared-expert-intermediate-size": spec.shared_expert_intermediate_size or None,
        "--moe-token-dispatcher-type": "alltoall",
        "--moe-router-load-balancing-type": "none",
    }


def _precision(spec: ModelSpec) -> Args:
    return {"--bf16": spec.dtype == "bfloat16", "--fp16": spec.dtype == "float16"}


def _olmoe(spec: ModelSpec, config: HfConfig) -> Args:
    return {
        "--qk-layernorm": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _mixtral(spec: ModelSpec, config: HfConfig) -> Args:
    return _softmax_top_k(spec, normalised=True)


def _qwen2_moe(spec: ModelSpec, config: HfConfig) -> Args:
    return {
        "--add-qkv-bias": config.get("qkv_bias", True),
        "--moe-shared-expert-gate": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _qwen3_moe(spec: ModelSpec, config: HfConfig) -> Args:
    return {
        "--qk-layernorm": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _deepseek_v2(spec: ModelSpec, config: HfConfig) -> Args:
    routing = {"--moe-router-pre-softmax": True, **_routed_scaling(config)}
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(
            f"topk_method={method!r} in config.json: Hugging Face's class knows greedy and "
            "group_limited_greedy only."
        )
    if method == "group_limited_greedy":
        # Hugging Face ranks groups by their best expert, Megatron by the sum of their best
        # top_k / topk_group experts: the same only if that is one.
        routing |= _groups(spec, config, experts_per_group=1)
    return {**_latent_attention(spec), **routing}


def _deepseek_v3(spec: ModelSpec, config: HfConfig) -> Args:
    return {
        **_latent_attention(spec),
        "--moe-router-score-function": "sigmoid",
        "--moe-router-enable-expert-bias": True,
        **_routed_scaling(config),
        # Here Hugging Face ranks groups by the sum of their best two experts.
        **_groups(spec, config, experts_per_group=2),
    }


_FAMILIES: dict[str, Callable[[ModelSpec, HfConfig], Args]] = {
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "mixtral": _mixtral,
    "olmoe": _olmoe,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
}


def _softmax_top_k(spec: ModelSpec, *, normalised: bool) -> Args:
    """Return the routing by softmax; normalised top-k weights are a softmax over the top-k only."""
    if normalised and spec.top_k == 1:
        raise ConfigError(
            "num_experts_per_tok=1 with normalised weights: Megatron refuses a softmax over one "
            "expert, which is always 1."
        )
    return {"--moe-router-pre-softmax": not normalised}


def _routed_scaling(config: HfConfig) -> Args:
    factor = _number(config, "routed_scaling_factor")
    return {"--moe-router-topk-scaling-factor": None if factor == 1.0 else factor}


def _groups(spec: ModelSpec, config: HfConfig, *, experts_per_group: int) -> Args:
    num_groups, kept_groups = _number(config, "n_group"), _number(config, "topk_group")
    if num_groups == 1:
        return {}
    if spec.top_k != experts_per_group * kept_groups:
        raise ConfigError(
            f"topk_group={kept_groups} with num_experts_per_tok={spec.top_k}: Megatron would rank "
            f"the groups by their best {spec.top_k / kept_groups:g} experts, Hugging Face ranks "
            f"them by {experts_per_group}, so other experts would be chosen."
        )
    return {"--moe-router-num-groups": num_groups, "--moe-router-group-topk": kept_groups}


def _latent_attention(spec: ModelSpec) -> Args:
    assert spec.mla is not None  # every model of these families has it
    return {
        "--multi-latent-attention": True,
        "--q-lora-rank": spec.mla.q_lora_rank,
        "--kv-lora-rank": spec.mla.kv_lora_rank,
        "--qk-head-dim": spec.mla.qk_nope_head_dim,
        "--qk-pos-emb-head-dim": spec.mla.qk_rope_head_dim,
        "--v-head-dim": spec.mla.v_head_dim,
        "--qk-layernorm": True,
        # Hugging Face computes the scores of these families in float32.
        "--moe-router-dtype": "fp32",
    }


def _rotary(spec: ModelSpec, config: HfConfig) -> Args:
    """Return the rotary positions; only DeepSeek's way of stretching them was checked."""
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise ConfigError(f"rope parameters {scaling!r} in config.json: a JSON object is needed.")
    rope = {"rope_theta": config.get("rope_theta"), **scaling}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and (kind != "yarn" or spec.mla is None):
        raise ConfigError(
            f"rope_scaling of type {kind!r}: no mapping to Megatron was checked for this family."
        )
    unknown = rope.keys() - _ROPE_FIELDS[kind]
    if unknown:
        raise ConfigError(
            f"{min(unknown)}={rope[min(unknown)]!r} among the rope parameters in config.json: "
            f"Megatron has no argument for it; of type {kind!r} there are "
            f"{', '.join(sorted(_ROPE_FIELDS[kind]))}."
        )
    base = _number(rope, "rope_theta")
    if base != int(base):
        raise ConfigError(f"rope_theta={base}: Megatron's --rotary-base takes whole numbers only.")
    # With latent attention Megatron's own default is to stretch.
    arguments: Args = {"--rotary-base": int(base), "--rope-type": "rope" if spec.mla else None}
    if kind == "default":
        return arguments
    # Megatron has no arguments for these three with latent attention; the values are its own.
    _require(rope, "original_max_position_embeddings", 4096)
    _require(rope, "beta_fast", 32, default=32)
    _require(rope, "beta_slow", 1, default=1)
    return arguments | {
        "--rope-type": "yarn",
        "--rotary-scaling-factor": _number(rope, "factor"),
        "--mscale": _number(rope, "mscale"),
        "--mscale-all-dim": _number(rope, "mscale_all_dim"),
    }


_ROPE_FIELDS = {"default": {"rope_theta", "rope_type", "type"}}
_ROPE_FIELDS["yarn"] = _ROPE_FIELDS["default"] | set(
    "factor mscale mscale_all_dim original_max_position_embeddings beta_fast beta_slow".split()
)


def _layer_pattern(spec: ModelSpec) -> str:
    """Return which layers have experts: 1 for every layer, or a list that Megatron evaluates."""
    num_dense = spec.num_layers - len(spec.moe_layers)
    if num_dense == 0:
        return "1"
    if spec.moe_layers == tuple(range(num_dense, spec.num_layers)):
        return f"([0]*{num_dense}+[1]*{len(spec.moe_layers)})"
    return str([int(layer in spec.moe_layers) for layer in range(spec.num_layers)]).replace(" ", "")


def _number(config: HfConfig, name: str, default: float | None = None) -> float:
    value = config.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} in config.json: Megatron needs a number here.")
    return value


def _require(config: HfConfig, name: str, expected: object, *, default: object = None) -> None:
    value = config.get(name, default)
    if value != expected:
        raise ConfigError(
            f"{name}={value!r} in config.json: Megatron computes with {name}={expected!r} only."
        )
