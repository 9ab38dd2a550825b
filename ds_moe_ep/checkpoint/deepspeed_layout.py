"""DeepSpeed's own MoE checkpoint layout, for the adapted model: which files, and what is in each.

Of every expert of every layer there is a file, and one with all dense weights, in a folder that a
file ``latest`` names: what ``engine.save_checkpoint`` of the adapted model writes, without the
state of a training. DeepSpeed's loader reads it at any ep_size.

Source: deepspeed/runtime/engine.py, _save_moe_checkpoint and load_moe_state_dict, of 0.19.8.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Set
from functools import partial
from typing import IO, Any

import deepspeed
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.checkpoint.layout import PlannedFile
from ds_moe_ep.checkpoint.mapping import ExpertTensor, rows_of
from ds_moe_ep.checkpoint.reader import TensorReader
from ds_moe_ep.checkpoint.torch_save import torch_save
from ds_moe_ep.checkpoint.transform import ModelNames
from ds_moe_ep.errors import CheckpointError, some
from ds_moe_ep.moe.experts import expert_parameters
from ds_moe_ep.moe.state_dict import EXPERT_LIST, PATH_OF_EXPERTS

__all__ = ["deepspeed_files"]

_LATEST = "latest"
_TAG = "global_step0"  # as DeepSpeed calls what is saved before the first step
_SUFFIX = "mp_rank_00_model_states.pt"

Stored = dict[str, tuple[StoredTensor, ...]]
"""Tensors by their names on disk, each with its pieces."""


def deepspeed_files(
    model: PreTrainedModel,
    tensors: Mapping[str, tuple[StoredTensor, ...]],
    layers: list[SwappedLayer],
    of_experts: Mapping[str, ExpertTensor],
) -> list[PlannedFile]:
    """Plans the weight files, and the file that names their folder.

    An expert's file takes the memory of that expert when it is written, the dense weights' file
    that of all dense weights.

    Args:
        model: The model on the meta device; its layers are cut to one expert.
        tensors: All tensors of the source.
        layers: The layers that have experts, in the order in which the model has them.
        of_experts: Which tensors hold experts.

    Raises:
        CheckpointError: The source lacks a tensor that DeepSpeed insists on.
    """
    split = _cut_to_one_expert(model, layers)
    names = ModelNames(model)
    dense = {key: pieces for key, pieces in tensors.items() if key not in of_experts}
    shared, dense = _split_off_shared(names, dense, layers)
    files = [_dense_file(model, names, dense, layers)]
    held = _tensors_by_expert(tensors, of_experts)
    for index, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            of_expert = held[layer.name, expert] | shared[layer.name]
            write = partial(_write_expert, names, layer.name, expert, split, of_expert)
            name = f"{_TAG}/layer_{index}_expert_{expert}_{_SUFFIX}"
            files.append(_file(name, of_expert, write))
    return [*files, PlannedFile(_LATEST, _TAG.encode())]


def _cut_to_one_expert(model: PreTrainedModel, layers: list[SwappedLayer]) -> set[str]:
    """Leaves one expert in each layer, as a file has it; returns the names of what is cut."""
    cut = set()
    for layer in layers:
        experts = model.get_submodule(layer.name)
        for name, param in expert_parameters(experts).items():
            setattr(experts, name, nn.Parameter(param[:1], requires_grad=param.requires_grad))
            cut.add(f"{layer.name}.{name}")
    return cut


def _tensors_by_expert(
    tensors: Mapping[str, tuple[StoredTensor, ...]], of_experts: Mapping[str, ExpertTensor]
) -> dict[tuple[str, int], Stored]:
    """Returns what makes up each expert: its tensors, and its rows of fused ones."""
    held: dict[tuple[str, int], Stored] = defaultdict(dict)
    for key, found in of_experts.items():
        if found.expert is not None:
            held[found.layer.name, found.expert][key] = tensors[key]
            continue
        for expert in range(found.layer.num_experts):
            rows = rows_of(tensors[key], range(expert, expert + 1))
            held[found.layer.name, expert][key] = tuple(rows)
    return held


def _split_off_shared(
    names: ModelNames, dense: Stored, layers: list[SwappedLayer]
) -> tuple[dict[str, Stored], Stored]:
    """Splits dense tensors into those inside of an experts module, by layer, and the others.

    A norm that all experts of a layer share goes into the file of each, see moe/state_dict.py.
    """
    shared: dict[str, Stored] = defaultdict(dict)
    others = dict(dense)
    prefixes = {f"{layer.name}.": layer.name for layer in layers}
    for key in dense:
        name = names.name(key)
        for prefix, layer_name in prefixes.items():
            if name.startswith(prefix):
                shared[layer_name][key] = others.pop(key)
    return shared, others


def _dense_file(
    model: PreTrainedModel, names: ModelNames, dense: Stored, layers: list[SwappedLayer]
) -> PlannedFile:
    wanted = {
        name
        for name in model.state_dict()
        if not name.startswith(tuple(f"{layer.name}." for layer in layers))
    }
    made = names.transform(
        {key: torch.empty(joined_shape(pieces), device="meta") for key, pieces in dense.items()}
    )
    if lacking := sorted(wanted - _with_tied(model, made).keys()):
        raise CheckpointError(
            f"{len(lacking)} tensors are not in the source; transformers would make them up, but "
            f"DeepSpeed's loader insists on them: {some(lacking)}. Load the model "
            "with transformers, save it, and convert that."
        )
    state = {
        "buffer_names": [name for name, _ in model.named_buffers() if name in wanted],
        "num_experts": [layer.num_experts for layer in layers],
        "optimizer": None,
        "lr_scheduler": None,
        "skipped_steps": 0,
        "global_steps": 0,
        "global_samples": 0,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": deepspeed.__version__,
    }
    return _file(f"{_TAG}/{_SUFFIX}", dense, partial(_write_dense, model, names, dense, state))


def _with_tied(model: PreTrainedModel, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors with those that are the same in the model, whichever was stored."""
    tied = dict(tensors)
    for name, other in getattr(model, "all_tied_weights_keys", {}).items():
        stored = tied.get(other, tied.get(name))
        if stored is not None:
            tied.setdefault(name, stored)
            tied.setdefault(other, stored)
    return tied


def _file(name: str, tensors: Stored, make: Callable[[IO[bytes]], None]) -> PlannedFile:
    pieces = tuple(piece for pieces in tensors.values() for piece in pieces)
    return PlannedFile(name, b"", pieces, make)


def _write_dense(
    model: PreTrainedModel,
    names: ModelNames,
    dense: Stored,
    state: dict[str, Any],
    out: IO[bytes],
) -> None:
    module = _with_tied(model, _read(names, dense))
    torch_save(state | {"module": module}, out)


def _write_expert(
    names: ModelNames,
    layer: str,
    expert: int,
    split: Set[str],
    tensors: Stored,
    out: IO[bytes],
) -> None:
    prefix = f"{layer}.{PATH_OF_EXPERTS}.{EXPERT_LIST}.{expert}."
    made = _read(names, tensors)
    state = {
        prefix + name.removeprefix(f"{layer}."): tensor[0] if name in split else tensor
        for name, tensor in made.items()
    }
    torch_save(state, out)


def _read(names: ModelNames, tensors: Stored) -> dict[str, Tensor]:
    with TensorReader() as reader:
        made = names.transform({key: reader.read(pieces) for key, pieces in tensors.items()})
    # torch.save writes all of the memory that a tensor is a view of.
    return {
        name: tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
        for name, tensor in made.items()
    }
