"""megatron.args: the command line that describes a model and a plan to Megatron-LM.

Only mappings that were checked against Hugging Face are here; what Megatron would compute
differently is refused. Data, tokenizer, checkpoint and optimizer are the user's part.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import ParallelPlan

__all__ = ["MEGATRON_ARGS", "megatron_args"]

MEGATRON_ARGS = "megatron.args"

Args = dict[str, object]
"""Argument name to its value. True is an argument without a value; False and None are none."""

HfConfig = Mapping[str, Any]

_HEADER = """\
# Written by `ds-moe-ep config` for Megatron-LM (argument names of megatron-core 0.19):
#   pretrain_gpt.py $(grep -v '^#' megatron.args) [data, tokenizer, checkpoint, optimizer]
"""

_OLMOE_NOTE = """\
# OLMoE normalises q and k over all heads together, --qk-layernorm over each head. The weights fit
# only if --spec names a layer whose attention does as OLMoE does; without one Megatron stops on the
# shape of q_layernorm.
"""


def megatron_args(plan: ParallelPlan, spec: ModelSpec, config: HfConfig) -> str:
    """Return the text of the argument file.

    Args:
        plan: sizes; tensor and pipeline parallelism are allowed here.
        spec: the model.
        config: its config.json, for what does not change sizes and so is not in `spec`.

    Raises:
        ConfigError: if the family has no checked mapping, or Megatron computes something else than
            Hugging Face for a value in `config`.
    """
    family = _FAMILIES.get(spec.model_type)
    if family is None:
        raise ConfigError(
            f"model_type={spec.model_type!r} has no mapping to Megatron that was checked against "
            f"Hugging Face; there is one for {', '.join(_FAMILIES)}."
        )
    own = family(spec, config)
    arguments = {
        **_parallelism(plan, spec),
        **_decoder(spec, config),
        **_experts(spec),
        **own,
        **_precision(spec),
    }
    note = _OLMOE_NOTE if spec.model_type == "olmoe" else ""
    lines = (
        name if value is True else f"{name} {value}"
        for name, value in arguments.items()
        if value is not None and value is not False
    )
    return _HEADER + note + "".join(f"{line}\n" for line in lines)


def _parallelism(plan: ParallelPlan, spec: ModelSpec) -> Args:
    for size, value, field in (
        ("pp_size", plan.pp_size, "num_layers"),
        ("tp_size", plan.tp_size, "vocab_size"),
    ):
        if getattr(spec, field) % value:
            raise ConfigError(
                f"{size}={value} does not divide {field}={getattr(spec, field)}: Megatron gives "
                f"every rank as much. Use a --{size[:2]} that does."
            )
    return {
        "--tensor-model-parallel-size": plan.tp_size,
        "--pipeline-model-parallel-size": plan.pp_size,
        "--expert-model-parallel-size": plan.ep_size,
        # An expert is split as every other tensor is; a size of 1 would keep it whole on each rank.
        "--expert-tensor-parallel-size": plan.tp_size,
        # Megatron's MoE layer asks for it wherever tensors are split.
        "--sequence-parallel": plan.tp_size > 1,
    }


def _decoder(spec: ModelSpec, config: HfConfig) -> Args:
    """Return what Llama-like decoders share."""
    _require(config, "hidden_act", "silu", default="silu")
    grouped = spec.num_key_value_heads != spec.num_attention_heads and spec.mla is None
    return {
        "--num-layers": spec.num_layers,
        "--hidden-size": spec.hidden_size,
        "--ffn-hidden-size": spec.intermediate_size,
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
        "--attention-dropout": 0.0,
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
    _require(config, "clip_qkv", None)
    _require(config, "attention_bias", False, default=False)
    return {
        "--qk-layernorm": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _mixtral(spec: ModelSpec, config: HfConfig) -> Args:
    _require(config, "sliding_window", None)
    return _softmax_top_k(spec, normalised=True)


def _qwen2_moe(spec: ModelSpec, config: HfConfig) -> Args:
    _require(config, "use_sliding_window", False, default=False)
    return {
        "--add-qkv-bias": config.get("qkv_bias", True),
        "--moe-shared-expert-gate": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _qwen3_moe(spec: ModelSpec, config: HfConfig) -> Args:
    _require(config, "use_sliding_window", False, default=False)
    _require(config, "attention_bias", False, default=False)
    return {
        "--qk-layernorm": True,
        **_softmax_top_k(spec, normalised=config.get("norm_topk_prob", False)),
    }


def _deepseek_v2(spec: ModelSpec, config: HfConfig) -> Args:
    routing = {"--moe-router-pre-softmax": True, **_routed_scaling(config)}
    if config.get("topk_method", "greedy") != "greedy":
        # Hugging Face ranks groups by their best expert, Megatron by the sum of their best
        # top_k / topk_group experts: the same only if that is one.
        routing |= _groups(spec, config, experts_per_group=1)
    return {**_latent_attention(spec, config), **routing}


def _deepseek_v3(spec: ModelSpec, config: HfConfig) -> Args:
    # Megatron always normalises sigmoid scores, and always rotates latent keys interleaved.
    _require(config, "norm_topk_prob", True, default=True)
    _require(config, "rope_interleave", True, default=True)
    return {
        **_latent_attention(spec, config),
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


def _latent_attention(spec: ModelSpec, config: HfConfig) -> Args:
    _require(config, "attention_bias", False, default=False)
    if spec.mla is None or spec.mla.q_lora_rank is None:
        raise ConfigError(
            "q_lora_rank=null: Megatron's local layers cannot normalise the keys without a "
            "low-rank query projection (megatron-core 0.19.2)."
        )
    return {
        "--multi-latent-attention": True,
        "--q-lora-rank": spec.mla.q_lora_rank,
        "--kv-lora-rank": spec.mla.kv_lora_rank,
        "--qk-head-dim": spec.mla.qk_nope_head_dim,
        "--qk-pos-emb-head-dim": spec.mla.qk_rope_head_dim,
        "--v-head-dim": spec.mla.v_head_dim,
        "--qk-layernorm": True,
    }


def _rotary(spec: ModelSpec, config: HfConfig) -> Args:
    """Return the rotary positions; only DeepSeek-V3's way of stretching them was checked."""
    # transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling.
    rope = config.get("rope_parameters") or {
        **(config.get("rope_scaling") or {}),
        "rope_theta": config.get("rope_theta"),
    }
    base = _number(rope, "rope_theta")
    if base != int(base):
        raise ConfigError(f"rope_theta={base}: Megatron's --rotary-base takes whole numbers only.")
    # With latent attention Megatron's own default is to stretch.
    arguments: Args = {"--rotary-base": int(base), "--rope-type": "rope" if spec.mla else None}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return arguments
    if kind != "yarn" or spec.model_type != "deepseek_v3":
        raise ConfigError(
            f"rope_scaling of type {kind!r}: no mapping to Megatron was checked for this family."
        )
    # Megatron has no arguments for these three; the values are its own.
    _require(rope, "original_max_position_embeddings", 4096)
    _require(rope, "beta_fast", 32, default=32)
    _require(rope, "beta_slow", 1, default=1)
    # Angles and scale compared with transformers 5.23: equal (YarnRotaryEmbedding, core 0.19.2).
    return arguments | {
        "--rope-type": "yarn",
        "--rotary-scaling-factor": _number(rope, "factor"),
        "--mscale": _number(rope, "mscale"),
        "--mscale-all-dim": _number(rope, "mscale_all_dim"),
    }


def _layer_pattern(spec: ModelSpec) -> str:
    """Return which layers have experts: 1 for every layer, or a list that Megatron evaluates."""
    num_dense = spec.num_layers - len(spec.moe_layers)
    if num_dense == 0:
        return "1"
    if spec.moe_layers == tuple(range(num_dense, spec.num_layers)):
        return f"([0]*{num_dense}+[1]*{len(spec.moe_layers)})"
    return str([int(layer in spec.moe_layers) for layer in range(spec.num_layers)]).replace(" ", "")


def _number(config: HfConfig, name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name}={value!r} in config.json: Megatron needs a number here.")
    return value


def _require(config: HfConfig, name: str, expected: object, *, default: object = None) -> None:
    value = config.get(name, default)
    if value != expected:
        raise ConfigError(
            f"{name}={value!r} in config.json: Megatron computes this family with "
            f"{name}={expected!r} only."
        )
