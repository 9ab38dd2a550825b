"""Builds the model of one rank: on the meta device, cut to its experts, filled, then adapted.

Building, reading and filling what no file holds are transformers' own, over the tensors that
mapping.py picks.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    initialization,
)
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, LoadStateDictInfo
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from ds_moe_ep import heap
from ds_moe_ep.adapter.replace import (
    AdaptReport,
    SwappedLayer,
    adapt,
    check_supported,
    shard_experts,
)
from ds_moe_ep.adapter.upcycle import put_upcycled_layers
from ds_moe_ep.checkpoint.files import NAME_A_MODEL, CheckpointFiles, open_checkpoint
from ds_moe_ep.checkpoint.mapping import own_tensors
from ds_moe_ep.checkpoint.reader import TensorReader
from ds_moe_ep.errors import AdapterError, CheckpointError
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.upcycle_settings import UPCYCLE_FIELD, UpcycleSettings

__all__ = [
    "build_on_meta",
    "load_expert_parallel_model",
    "read_model_config",
    "refuse_incomplete",
]

_SHOWN = 5
_NO_READ_AHEAD = "HF_DEACTIVATE_ASYNC_LOAD"


def load_expert_parallel_model(
    folder: str | Path,
    plan: ParallelPlan,
    *,
    ep_rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dispatcher: str = "auto",
    placement: SlotPlacement | None = None,
) -> tuple[PreTrainedModel, AdaptReport]:
    """Loads a Hugging Face MoE model with the experts of one rank.

    Args:
        folder: Model directory with config.json and safetensors.
        plan: The parallel sizes.
        ep_rank: Rank in the expert group.
        dtype: What the weights are held in.
        device: Where they are held.
        dispatcher: Name of the dispatcher, or ``auto``.
        placement: Experts in slots; by default they are contiguous.

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
    layers = shard_experts(model, plan.ep_size, ep_rank, placement)
    _fill(model, files, layers, dtype, device)
    report = adapt(model, plan, ep_rank=ep_rank, dispatcher=dispatcher, placement=placement)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval(), report


def read_model_config(folder: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Reads a model directory's config.json.

    Args:
        folder: The directory.
        trust_remote_code: Whether code in it may be run, where transformers has none of its own.

    Raises:
        AdapterError: transformers cannot read it, it needs code that is not trusted or fails, or
            the checkpoint is quantized.
    """
    if not (Path(folder) / "config.json").is_file():
        raise AdapterError(f"{folder} has no config.json. {NAME_A_MODEL}")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # whatever stands there may break transformers' class of it
        if "trust_remote_code" not in str(error):
            raise AdapterError(
                f"{folder}: transformers cannot read config.json: {error}"
            ) from error
        if not trust_remote_code:
            raise AdapterError(
                f"{folder}: config.json asks for code of the model's own (auto_map), which is not "
                "run. If you trust it, ds-moe-ep convert converts the weights with "
                "--trust-remote-code; other commands run models that transformers itself knows."
            ) from error
        _refuse_code_from_elsewhere(folder)
        try:
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=True, local_files_only=True
            )
        except Exception as error:  # whatever the model's own code raises
            raise AdapterError(
                f"{folder}: the model's own code (auto_map) does not make a config: {error}"
            ) from error
    if quantization := getattr(config, "quantization_config", None):
        method = dict(quantization).get("quant_method", "unknown method")
        raise AdapterError(
            f"{folder}: quantized checkpoints ({method}) cannot be split over ranks. Use the bf16 "
            "or fp32 weights of the model."
        )
    return config


def _refuse_code_from_elsewhere(folder: str | Path) -> None:
    config, _ = PreTrainedConfig.get_config_dict(folder)
    places = [str(place) for place in config["auto_map"].values()]
    if elsewhere := sorted(place for place in places if "--" in place):
        raise AdapterError(
            f"{folder}: config.json asks for code of another repository ({elsewhere[0]}), and "
            "nothing is fetched from a hub. Copy that code into the folder, and name it in "
            "auto_map without the repository."
        )


def build_on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Builds the language model of a config on the meta device, where it takes no memory.

    Of a multimodal family it is the text-only class where there is one; else the whole model, whose
    text-only path needs no more than ``input_ids``. An upcycled model has its MoE layers.

    Raises:
        AdapterError: The family cannot be supported, or transformers cannot build it.
    """
    check_supported(config)
    own_code = _has_own_code(config)
    is_causal = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or own_code
    auto_class = AutoModelForCausalLM if is_causal else AutoModelForMultimodalLM
    try:
        with torch.device("meta"), initialization.meta_device_safe_creation_ops():
            model = auto_class.from_config(config, dtype=dtype, trust_remote_code=own_code)
    except ImportError as error:
        raise AdapterError(
            f"{config.model_type}: transformers needs a package that is missing here: {error}. "
            "Install it on every host."
        ) from error
    except ValueError as error:
        raise AdapterError(f"{config.model_type}: transformers cannot build it: {error}") from error
    if upcycled := getattr(config, UPCYCLE_FIELD, None):
        put_upcycled_layers(model, UpcycleSettings.from_dict(upcycled, source="config.json"))
    return model


def _has_own_code(config: PreTrainedConfig) -> bool:
    """Returns whether a config's class came with the model; then its code was trusted before."""
    return type(config).__module__.split(".")[0] == TRANSFORMERS_DYNAMIC_MODULE_NAME


def _fill(
    model: PreTrainedModel,
    files: CheckpointFiles,
    layers: list[SwappedLayer],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    with TensorReader() as reader, _little_memory():
        own = own_tensors(model, files, layers, reader)
        settings = LoadStateDictConfig(
            device_map={"": device},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            weight_mapping=own.conversions,
            ignore_mismatched_sizes=True,  # they are refused here, by name
        )
        info, _ = convert_and_load_state_dict_in_model(model, own.tensors, settings)
    if info.conversion_errors:
        refuse_incomplete(files.folder, info)
    # Ties weights and computes what no file holds: the rotary frequencies, say.
    model._finalize_model_loading(model, settings, info)
    refuse_incomplete(files.folder, info)


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Keeps loading from holding much more than the model.

    transformers would read all experts ahead before it joins them; and in one heap with what is
    kept, the memory of temporary tensors could not go back to the system (measured: a quarter more
    than the model), so tensors get mappings of their own.
    """
    before = os.environ.get(_NO_READ_AHEAD)
    os.environ[_NO_READ_AHEAD] = "1"
    heap.give_freed_memory_back()
    try:
        yield
    finally:
        heap.keep_freed_memory()
        if before is None:
            del os.environ[_NO_READ_AHEAD]
        else:
            os.environ[_NO_READ_AHEAD] = before


def refuse_incomplete(folder: Path, info: LoadStateDictInfo) -> None:
    """Refuses weights that are not all of a model's, and no others, in its shapes.

    Args:
        folder: What the message names.
        info: What transformers' loader says of them.

    Raises:
        CheckpointError: With names and counts.
    """
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
