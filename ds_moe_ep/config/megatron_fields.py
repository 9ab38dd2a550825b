"""What becomes of each field of config.json on the way to Megatron, as data, and the check of it.

A field is mapped to an argument, or has the only value that Megatron computes with, or changes no
result of a forward pass. Any other is refused by name. The values are mapped in megatron_model.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.errors import ConfigError, nearest

__all__ = ["FIELDS", "Fate", "Mapped", "Only", "WithoutEffect", "check_fields"]

HfConfig = Mapping[str, Any]


@dataclass(frozen=True)
class Mapped:
    """The value goes into an argument, or, with others, decides on one."""

    argument: str


@dataclass(frozen=True)
class Only:
    """Megatron has no argument for it and computes as Hugging Face does with this value alone.

    Attributes:
        value: that value, or how to take it from the other fields.
        reason: what Megatron does, or has not.
        default: what transformers takes where the field is absent, if that is another value.
    """

    value: object
    reason: str
    default: object = None


@dataclass(frozen=True)
class WithoutEffect:
    """It changes no logit; the reason says what it is for."""

    reason: str


Fate = Mapped | Only | WithoutEffect

_TOKENS = WithoutEffect("special tokens, which the tokenizer and generation use")
_TRAINING = WithoutEffect("training only")
_OUTPUTS = WithoutEffect("what a call returns besides logits")
_FILES = WithoutEffect("how the file or the class came about")
_SAMPLING = WithoutEffect("defaults of generation, from older versions of transformers")
_LEFT_OUT = WithoutEffect("layers that Hugging Face's class leaves out")
_REMOTE = WithoutEffect("of the code that came with the first checkpoints; transformers ignores it")

_GENERIC: dict[str, Fate] = {
    **dict.fromkeys(
        "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
        "forced_bos_token_id forced_eos_token_id prefix tokenizer_class".split(),
        _TOKENS,
    ),
    **dict.fromkeys(
        "initializer_range router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise "
        "problem_type id2label label2id num_labels finetuning_task task_specific_params".split(),
        _TRAINING,
    ),
    **dict.fromkeys(
        "output_hidden_states output_attentions output_router_logits output_scores return_dict "
        "return_dict_in_generate use_cache chunk_size_feed_forward".split(),
        _OUTPUTS,
    ),
    **dict.fromkeys(
        "architectures model_type transformers_version _name_or_path name_or_path auto_map "
        "_attn_implementation attn_implementation _commit_hash torchscript tf_legacy_loss "
        "use_bfloat16 pruned_heads is_decoder is_encoder_decoder add_cross_attention "
        "cross_attention_hidden_size tie_encoder_decoder".split(),
        _FILES,
    ),
    **dict.fromkeys(
        "do_sample temperature top_k top_p typical_p num_beams num_beam_groups "
        "num_return_sequences max_length min_length early_stopping length_penalty "
        "repetition_penalty diversity_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size "
        "bad_words_ids exponential_decay_length_penalty suppress_tokens begin_suppress_tokens "
        "remove_invalid_values".split(),
        _SAMPLING,
    ),
}

_SHARED: dict[str, Fate] = {
    **_GENERIC,
    "vocab_size": Mapped("--padded-vocab-size"),
    "hidden_size": Mapped("--hidden-size"),
    "num_hidden_layers": Mapped("--num-layers"),
    "num_attention_heads": Mapped("--num-attention-heads"),
    "num_key_value_heads": Mapped("--num-query-groups"),
    "max_position_embeddings": Mapped("--max-position-embeddings"),
    "rms_norm_eps": Mapped("--norm-epsilon"),
    "tie_word_embeddings": Mapped("--untie-embeddings-and-output-weights"),
    "attention_dropout": Mapped("--attention-dropout"),
    "dtype": Mapped("--bf16"),
    "torch_dtype": Mapped("--bf16"),
    "rope_theta": Mapped("--rotary-base"),
    "rope_parameters": Mapped("--rotary-base"),
    "rope_scaling": Mapped("--rope-type"),
    "num_experts": Mapped("--num-experts"),
    "num_local_experts": Mapped("--num-experts"),
    "num_experts_per_tok": Mapped("--moe-router-topk"),
    "hidden_act": Only("silu", "--swiglu is silu", default="silu"),
}

_NO_BIAS = Only(False, "--disable-bias-linear leaves out all biases", default=False)
_NO_WINDOW = Only(False, "windows were not compared with Hugging Face's", default=False)
_WINDOW_IS_OFF = WithoutEffect("the window, which use_sliding_window turns off")

_WIDTH_OF_EXPERTS: dict[str, Fate] = {"intermediate_size": Mapped("--moe-ffn-hidden-size")}
_WIDTH_OF_BOTH: dict[str, Fate] = {
    "intermediate_size": Mapped("--ffn-hidden-size"),
    "moe_intermediate_size": Mapped("--moe-ffn-hidden-size"),
}
_HEAD_DIM: dict[str, Fate] = {"head_dim": Mapped("--kv-channels")}
_NORMALISED: dict[str, Fate] = {"norm_topk_prob": Mapped("--moe-router-pre-softmax")}


def _all_full(config: HfConfig) -> object:
    kinds = config.get("layer_types")
    return ["full_attention"] * len(kinds) if isinstance(kinds, list) else None


def _even_heads(config: HfConfig) -> object:
    return config.get("hidden_size", 0) // config.get("num_attention_heads", 1)


_QWEN: dict[str, Fate] = {
    **_SHARED,
    **_WIDTH_OF_BOTH,
    **_HEAD_DIM,
    **_NORMALISED,
    "decoder_sparse_step": Mapped("--moe-layer-freq"),
    "mlp_only_layers": Mapped("--moe-layer-freq"),
    "use_sliding_window": _NO_WINDOW,
    "sliding_window": _WINDOW_IS_OFF,
    "max_window_layers": _WINDOW_IS_OFF,
    "layer_types": Only(_all_full, "windows were not compared with Hugging Face's"),
}

_DEEPSEEK: dict[str, Fate] = {
    **_SHARED,
    **_WIDTH_OF_BOTH,
    # The norms of latents have an epsilon of their own in transformers, and none in Megatron.
    "rms_norm_eps": Only(1e-6, "all norms share --norm-epsilon, Hugging Face's latents have 1e-06"),
    "num_key_value_heads": Only(
        lambda config: config.get("num_attention_heads"), "latents are shared by all heads"
    ),
    "head_dim": Only(
        lambda config: config.get("qk_rope_head_dim"), "it is the width that is rotated"
    ),
    "qk_head_dim": Only(
        lambda config: config.get("qk_nope_head_dim", 0) + config.get("qk_rope_head_dim", 0),
        "it is the sum of both parts",
    ),
    "n_routed_experts": Mapped("--num-experts"),
    "n_shared_experts": Mapped("--moe-shared-expert-intermediate-size"),
    "first_k_dense_replace": Mapped("--moe-layer-freq"),
    "moe_layer_freq": Only(1, "Hugging Face has experts in every later layer", default=1),
    "routed_scaling_factor": Mapped("--moe-router-topk-scaling-factor"),
    "n_group": Mapped("--moe-router-num-groups"),
    "topk_group": Mapped("--moe-router-group-topk"),
    "q_lora_rank": Mapped("--q-lora-rank"),
    "kv_lora_rank": Mapped("--kv-lora-rank"),
    "qk_nope_head_dim": Mapped("--qk-head-dim"),
    "qk_rope_head_dim": Mapped("--qk-pos-emb-head-dim"),
    "v_head_dim": Mapped("--v-head-dim"),
    "attention_bias": _NO_BIAS,
    "pretraining_tp": _REMOTE,
    "ep_size": _REMOTE,
    # Rounded activations would change logits. `convert` refuses quantized weights, so only weights
    # that were dequantized first reach Megatron, and these arguments are for them.
    "quantization_config": WithoutEffect("of the published weights; the arguments are for bf16"),
}

FIELDS: dict[str, dict[str, Fate]] = {
    "deepseek_v2": {
        **_DEEPSEEK,
        "topk_method": Mapped("--moe-router-num-groups"),
        "scoring_func": Only("softmax", "Hugging Face's class knows no other", default="softmax"),
        "norm_topk_prob": Only(False, "Hugging Face's class does not normalise", default=False),
        "mlp_bias": _NO_BIAS,
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "topk_method": Only("noaux_tc", "Hugging Face's class knows no other", default="noaux_tc"),
        "scoring_func": Only("sigmoid", "Hugging Face's class knows no other", default="sigmoid"),
        "norm_topk_prob": Only(True, "sigmoid scores are always normalised", default=True),
        "rope_interleave": Only(True, "rotated parts are always interleaved", default=True),
        **dict.fromkeys(("num_nextn_predict_layers", "num_mtp_layers"), _LEFT_OUT),
    },
    "mixtral": {
        **_SHARED,
        **_WIDTH_OF_EXPERTS,
        **_HEAD_DIM,
        "sliding_window": Only(None, "windows were not compared with Hugging Face's"),
    },
    "olmoe": {
        **_SHARED,
        **_WIDTH_OF_EXPERTS,
        **_NORMALISED,
        "head_dim": Only(_even_heads, "the norms of queries and keys have hidden_size in all"),
        "clip_qkv": Only(None, "projections are not clipped"),
        "attention_bias": _NO_BIAS,
    },
    "qwen2_moe": {
        **_QWEN,
        "shared_expert_intermediate_size": Mapped("--moe-shared-expert-intermediate-size"),
        "qkv_bias": Mapped("--add-qkv-bias"),
    },
    "qwen3_moe": {**_QWEN, "attention_bias": _NO_BIAS},
}
"""model_type -> field of config.json -> what becomes of it."""


def check_fields(model_type: str, config: HfConfig) -> None:
    """Refuse what Megatron would compute otherwise than Hugging Face, or what is not known.

    Args:
        model_type: a family of `FIELDS`.
        config: the content of config.json.

    Raises:
        ConfigError: with the field, its value and what is possible.
    """
    fates = FIELDS[model_type]
    for name, value in config.items():
        if name not in fates:
            close = nearest(name, fates)
            hint = f"Did you mean {close}? " if close else ""
            raise ConfigError(
                f"{name}={value!r} in config.json: what it means for a {model_type} model in "
                f"Megatron is not known. {hint}Remove it if no result depends on it."
            )
    for name, fate in fates.items():
        if isinstance(fate, Only):
            _check_only(config, name, fate)


def _check_only(config: HfConfig, name: str, fate: Only) -> None:
    value = config.get(name)
    if value is None:
        value = fate.default
    expected = fate.value(config) if callable(fate.value) else fate.value
    if value is not None and value != expected:
        raise ConfigError(
            f"{name}={value!r} in config.json: Megatron computes this family with "
            f"{name}={expected!r} only ({fate.reason})."
        )
