"""The two configurations for DeepSpeed: inference with this package, and fine-tuning with AutoEP.

It builds dictionaries and never imports DeepSpeed; a user's own file is checked in run.py.
"""

from typing import Any

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import HOW_TO_UPCYCLE, ParallelPlan

__all__ = [
    "AUTOEP_PRESETS",
    "DS_INFERENCE_JSON",
    "DS_TRAIN_AUTOEP_JSON",
    "autoep_config",
    "dtype_name",
    "inference_config",
    "require_pure_ep",
]

DS_INFERENCE_JSON = "ds_inference.json"
DS_TRAIN_AUTOEP_JSON = "ds_train_autoep.json"

AUTOEP_PRESETS = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "minimax_m3_vl_text": "minimax_m3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_5_moe_text": "qwen3_5_moe",
    "qwen3_moe": "qwen3_moe",
}
"""AutoEP's preset by model_type (DeepSpeed 0.19.8, deepspeed/module_inject/auto_ep_presets)."""

_DTYPE_SPELLINGS = {
    "bfloat16": ("bfloat16", "torch.bfloat16", "bf16", "bfloat"),
    "float16": ("float16", "torch.float16", "fp16", "half"),
    "float32": ("float32", "torch.float32", "fp32", "float"),
}


def dtype_name(text: str) -> str:
    """Return bfloat16, float16 or float32 for any spelling that DeepSpeed knows.

    Raises:
        ConfigError: for another type.
    """
    for name, spellings in _DTYPE_SPELLINGS.items():
        if text in spellings:
            return name
    raise ConfigError(
        f"dtype={text!r} is not a type that can be run. Use one of {', '.join(_DTYPE_SPELLINGS)}."
    )


def require_pure_ep(plan: ParallelPlan, spec: ModelSpec) -> None:
    """Refuse what neither launch/infer.py nor AutoEP runs.

    Raises:
        ConfigError: if tensors or layers are split, or the model has no experts.
    """
    if not spec.is_moe:
        raise ConfigError(
            f"{spec.name} has no MoE layer, so ep_size={plan.ep_size} has no experts to spread. "
            f"{HOW_TO_UPCYCLE}."
        )
    if plan.tp_size != 1 or plan.pp_size != 1:
        raise ConfigError(
            f"tp_size={plan.tp_size}, pp_size={plan.pp_size}: this package runs expert parallelism "
            f"with tp_size=1 and pp_size=1; a plan that splits tensors or layers is for Megatron "
            f"only. Use --tp 1 --pp 1."
        )


def inference_config(
    plan: ParallelPlan, spec: ModelSpec, *, dtype: str | None = None
) -> dict[str, Any]:
    """Return what `deepspeed.init_inference(model, config=...)` takes.

    Args:
        plan: sizes with tp_size = pp_size = 1.
        spec: the model.
        dtype: type of the weights in any of DeepSpeed's spellings; by default the model's own.

    Returns:
        A dictionary of JSON values. `max_out_tokens` is the model's context length, because
        DeepSpeed refuses longer prompts than that and would else put the limit at 1024.

    Raises:
        ConfigError: if the plan or the model is not one for expert parallelism alone.
    """
    require_pure_ep(plan, spec)
    return {
        "dtype": dtype_name(dtype or spec.dtype),
        "max_out_tokens": spec.max_position_embeddings,
        "moe": {"ep_size": plan.ep_size, "num_experts": [spec.num_experts]},
        "replace_with_kernel_inject": False,
        "tensor_parallel": {"tp_size": 1},
    }


def autoep_config(plan: ParallelPlan, spec: ModelSpec) -> dict[str, Any]:
    """Return what `deepspeed.initialize(model, config=...)` takes to fine-tune with AutoEP.

    The batch size and the learning rate are a place to start, not advice.

    Args:
        plan: sizes with tp_size = pp_size = 1.
        spec: the model.

    Raises:
        ConfigError: if AutoEP has no preset for this family, or the plan is not one for expert
            parallelism alone.
    """
    require_pure_ep(plan, spec)
    preset = AUTOEP_PRESETS.get(spec.model_type)
    if preset is None:
        raise ConfigError(
            f"DeepSpeed's AutoEP has no preset for model_type={spec.model_type!r}; "
            f"it has them for {', '.join(AUTOEP_PRESETS)}."
        )
    config: dict[str, Any] = {
        "expert_parallel": {"enabled": True, "autoep_size": plan.ep_size, "preset_model": preset},
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 1},
    }
    precision = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype_name(spec.dtype))
    if precision is not None:
        config[precision] = {"enabled": True}
    return config
