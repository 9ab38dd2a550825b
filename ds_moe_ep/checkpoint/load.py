"""Builds the model of one rank: on the meta device, cut to its experts, filled, then adapted.

Reading is transformers' own loader over the tensors that mapping.py picks; building without memory
is accelerate's.
"""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from ds_moe_ep.adapter.replace import (
    AdaptReport,
    SwappedLayer,
    adapt,
    check_supported,
    shard_experts,
)
from ds_moe_ep.checkpoint.files import CheckpointFiles, open_checkpoint
from ds_moe_ep.checkpoint.mapping import own_tensors
from ds_moe_ep.errors import AdapterError, CheckpointError
from ds_moe_ep.plan import ParallelPlan

__all__ = ["build_on_meta", "load_expert_parallel_model", "read_model_config"]

_SHOWN = 5


def load_expert_parallel_model(
    folder: str | Path,
    plan: ParallelPlan,
    *,
    ep_rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dispatcher: str = "auto",
) -> tuple[PreTrainedModel, AdaptReport]:
    """Loads a Hugging Face MoE model with the experts of one rank.

    Args:
        folder: Model directory with config.json and safetensors.
        plan: The parallel sizes.
        ep_rank: Rank in the expert group.
        dtype: What the weights are held in.
        device: Where they are held.
        dispatcher: Name of the dispatcher, or ``auto``.

    Returns:
        The adapted model in eval mode, and what was swapped. Bind its groups with
        `adapter.bind_expert_groups`.

    Raises:
        CheckpointError: Weights are missing, corrupt, mis-shaped or not the model's.
        AdapterError: The model cannot be adapted.
    """
    folder = Path(folder)
    files = open_checkpoint(folder)
    model = build_on_meta(read_model_config(folder), dtype)
    layers = shard_experts(model, plan.ep_size, ep_rank)
    _fill(model, files, layers, dtype, device)
    report = adapt(model, plan, ep_rank=ep_rank, dispatcher=dispatcher)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), report


def read_model_config(folder: str | Path) -> PreTrainedConfig:
    """Reads a model directory's config.json.

    Raises:
        AdapterError: transformers cannot read it, or the checkpoint is quantized.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{folder}: transformers cannot read config.json: {error}") from error
    if quantization := getattr(config, "quantization_config", None):
        method = dict(quantization).get("quant_method", "unknown method")
        raise AdapterError(
            f"{folder}: quantized checkpoints ({method}) cannot be split over ranks. Use the bf16 "
            "or fp32 weights of the model."
        )
    return config


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the language model of a config, its parameters on the meta device.

    Of a multimodal family it is the text-only class where there is one; else the whole model, whose
    text-only path needs no more than ``input_ids``.

    Raises:
        AdapterError: The family cannot be supported, or transformers cannot build it.
    """
    check_supported(config)
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    auto_class = AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM
    try:
        with init_empty_weights(include_buffers=False):
            return auto_class.from_config(config, dtype=dtype)
    except ImportError as error:
        raise AdapterError(
            f"{config.model_type}: transformers needs a package that is missing here: {error}. "
            "Install it on every host."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{config.model_type}: transformers cannot build it: {error}") from error


def _fill(
    model: PreTrainedModel,
    files: CheckpointFiles,
    layers: list[SwappedLayer],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    settings = LoadStateDictConfig(
        device_map={"": device},
        dtype=dtype,
        dtype_plan=model._get_dtype_plan(dtype),
        weight_mapping=get_model_conversion_mapping(model),
    )
    info, _ = convert_and_load_state_dict_in_model(
        model, own_tensors(model, files, layers), settings
    )
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    _refuse_incomplete(files.folder, info)
    model.to(device)  # buffers that are computed, not loaded


def _refuse_incomplete(folder: Path, info) -> None:
    mismatched = [
        f"{name} is {list(found)}, the model's is {list(wanted)}"
        for name, found, wanted in info.mismatched_keys
    ]
    problems = {
        "missing": sorted(info.missing_keys),
        "of the wrong shape": sorted(mismatched),
        "not convertible": sorted(info.conversion_errors),
        "not the model's": sorted(info.unexpected_keys),
    }
    told = [
        f"{len(names)} {what}: {'; '.join(names[:_SHOWN])}"
        for what, names in problems.items()
        if names
    ]
    if told:
        raise CheckpointError(f"{folder}: the weights do not fit config.json: {' | '.join(told)}.")
