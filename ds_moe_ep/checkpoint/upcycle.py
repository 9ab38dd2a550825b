"""Writes an upcycled model: the dense one, with chosen FFNs made the experts of MoE layers.

What is asked for is checked here. Which modules are FFNs is settled in adapter/ffn.py, and which
tensors the model consists of in upcycled_tensors.py.

Source: sparse upcycling, https://arxiv.org/abs/2212.05055
"""

from __future__ import annotations

import json
from pathlib import Path

from transformers import PreTrainedConfig

from ds_moe_ep.adapter.ffn import Ffn, find_ffns
from ds_moe_ep.adapter.replace import check_ep_size
from ds_moe_ep.adapter.upcycle import select_ffns
from ds_moe_ep.checkpoint.architectures import architecture_for, moe_config
from ds_moe_ep.checkpoint.convert import (
    MAX_DENSE_BYTES,
    Conversion,
    choose_ep_size,
    write_expert_sharded,
)
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.hub_folder import beside_the_weights, folder_name
from ds_moe_ep.checkpoint.layout import PlannedFile, model_files, shard_tensors
from ds_moe_ep.checkpoint.load import read_model_config
from ds_moe_ep.checkpoint.manifest import SourceSection
from ds_moe_ep.checkpoint.source import open_source
from ds_moe_ep.checkpoint.transform import ModelNames
from ds_moe_ep.checkpoint.upcycled_tensors import UpcycledTensors, UpcycleRequest
from ds_moe_ep.checkpoint.writer import ShowProgress, silently, write_folder
from ds_moe_ep.errors import AdapterError
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan, valid_ep_sizes
from ds_moe_ep.upcycle_settings import METHODS, UPCYCLE_FIELD, UpcycleSettings

__all__ = ["UpcycleRequest", "upcycle_to_expert_sharded", "upcycle_to_hugging_face"]

_CONFIG_JSON = "config.json"


def upcycle_to_expert_sharded(
    source: Path,
    folder: Path,
    request: UpcycleRequest,
    ep_size: int | None = None,
    *,
    allow_pickle: bool = False,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes an upcycled model as an expert-sharded checkpoint, which launch/infer.py runs.

    Args:
        source: Hugging Face directory of a dense model.
        folder: What to write.
        request: What to make of it.
        ep_size: Number of expert files; by default the largest up to 64 that divides the experts.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: The model cannot be upcycled like that, or ep_size does not divide the
            experts.
        PlanError: ep_size is below 1.
        CheckpointError: The source is not whole, or `folder` cannot be written.
    """
    _, made = _read(source, request, allow_pickle)
    ep_size = choose_ep_size(ep_size, request.num_experts)
    check_ep_size(made.ffns[0].name, request.num_experts, ep_size)
    experts, of_experts = made.experts_fused()
    tensors = {**made.dense(), **made.routers("{slot}.router.weight"), **experts}
    config = json.loads((source / _CONFIG_JSON).read_text(encoding="utf-8"))
    config[UPCYCLE_FIELD] = made.settings.to_dict()
    others, not_copied = _beside(source, made.files, f"{json.dumps(config, indent=2)}\n")
    write_expert_sharded(
        folder,
        shard_tensors(tensors, of_experts, ep_size, max_dense_bytes=MAX_DENSE_BYTES),
        others,
        plan=ParallelPlan(ep_size),
        source=SourceSection(name=folder_name(source), files={}, index=None),
        show_progress=show_progress,
    )
    return Conversion.of(folder, not_copied)


def upcycle_to_hugging_face(
    source: Path,
    folder: Path,
    request: UpcycleRequest,
    *,
    allow_pickle: bool = False,
    max_file_bytes: int = MAX_DENSE_BYTES,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes an upcycled model as an ordinary Hugging Face model of an MoE family.

    Args:
        source: Hugging Face directory of a dense model.
        folder: What to write.
        request: What to make of it.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        max_file_bytes: Size at which another file begins.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: The model cannot be upcycled like that, or no MoE family computes the same.
        CheckpointError: The source is not whole, or `folder` cannot be written.
    """
    dense_config, made = _read(source, request, allow_pickle)
    architecture = architecture_for(dense_config, made.settings)
    block = f"model.layers.{{layer}}.{architecture.block}"
    tensors = {
        **made.dense(),
        **made.routers(f"{block}.gate.weight"),
        **made.experts_one_by_one(f"{block}.experts", architecture),
        **(made.empty_shared_experts(block) if architecture.has_empty_shared_expert else {}),
    }
    width = made.settings.expert_width(made.ffns[0].intermediate_size)
    config = moe_config(dense_config, architecture, made.settings, width)
    others, not_copied = _beside(source, made.files, config)
    weights = model_files(tensors, max_file_bytes=max_file_bytes)
    write_folder(folder, weights, others, show_progress=show_progress)
    return Conversion.of(folder, not_copied)


def _read(
    source: Path, request: UpcycleRequest, allow_pickle: bool
) -> tuple[PreTrainedConfig, UpcycledTensors]:
    """Reads what there is and checks that it can be upcycled as asked."""
    opened = open_source(source, allow_pickle=allow_pickle)
    config = read_model_config(source)  # not the built model's, which says float32
    if read_model_spec(source).is_moe:
        raise AdapterError(
            f"{source} ({config.model_type}) has experts already: only dense models are "
            "upcycled. Leave --upcycle-experts out."
        )
    ffns = find_ffns(opened.model, request.ffn_class)
    layers = _layers(request, ffns)
    chosen = select_ffns(ffns, layers)
    settings = _settings(request, chosen)
    rules = ModelNames(opened.model)
    names = {rules.name(key): key for key in opened.files.tensors}
    opened.check_tensors()
    return config, UpcycledTensors(request, settings, opened.files, names, chosen)


def _beside(
    source: Path, files: CheckpointFiles, config: str
) -> tuple[list[PlannedFile], tuple[str, ...]]:
    """Plans the files beside the weights, with another config.json."""
    copied, left_out = beside_the_weights(source, files)
    others = [file for file in copied if file.name != _CONFIG_JSON]
    return [*others, PlannedFile(_CONFIG_JSON, config.encode())], left_out


def _layers(request: UpcycleRequest, ffns: list[Ffn]) -> tuple[int, ...]:
    """Returns which layers are to get experts."""
    if request.layers is not None:
        return tuple(sorted(set(request.layers)))
    layers = tuple(ffn.layer for ffn in ffns)
    if request.every is None:
        return layers
    every = tuple(n for n in layers if request.every > 0 and (n + 1) % request.every == 0)
    if not every:
        raise AdapterError(
            f"--every {request.every}: no layer would get experts. Use 1 to {layers[-1] + 1}, or "
            "name them: --layers 3,5,7."
        )
    return every


def _settings(request: UpcycleRequest, ffns: list[Ffn]) -> UpcycleSettings:
    """Checks that the FFNs can become what is asked for."""
    if request.num_experts < 1 or not 1 <= request.top_k <= request.num_experts:
        raise AdapterError(
            f"--top-k {request.top_k} with --upcycle-experts {request.num_experts}: a token can be "
            f"sent to 1 to {max(request.num_experts, 1)} of them, and there is at least 1."
        )
    if request.method not in METHODS:
        raise AdapterError(f"--method {request.method}: use one of {', '.join(METHODS)}.")
    width = ffns[0].intermediate_size
    if other := next((ffn for ffn in ffns if ffn.intermediate_size != width), None):
        raise AdapterError(
            f"the FFN {ffns[0].name} has width {width}, {other.name} has width "
            f"{other.intermediate_size}: all experts must be equally wide. Name layers where they "
            "are: --layers 3,5,7."
        )
    if request.method == "split" and width % request.num_experts:
        fitting = valid_ep_sizes(width, at_most=4 * request.num_experts)
        raise AdapterError(
            f"--method split: --upcycle-experts {request.num_experts} does not divide the FFN's "
            f"width {width} ({ffns[0].name}). Use one of {fitting}, or --method copy."
        )
    layers = tuple(ffn.layer for ffn in ffns)
    ffn_class = type(ffns[0].module).__name__
    return UpcycleSettings(request.num_experts, request.top_k, layers, request.method, ffn_class)
