"""Which expert a tensor of a checkpoint belongs to, and so which tensors one rank reads.

transformers' conversion mapping says which parameter a tensor belongs to; nothing here knows a
model family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.checkpoint.reader import StoredSlice, TensorReader
from ds_moe_ep.errors import CheckpointError
from ds_moe_ep.moe.experts import expert_parameters

__all__ = ["ExpertTensor", "expert_tensors", "own_tensors"]


@dataclass(frozen=True)
class ExpertTensor:
    """What a tensor on disk holds of the experts of a layer.

    Attributes:
        layer: The layer.
        expert: The expert it is of; None if it holds all of the layer's, in dimension 0.
    """

    layer: SwappedLayer
    expert: int | None


def expert_tensors(
    model: PreTrainedModel, files: CheckpointFiles, layers: list[SwappedLayer]
) -> dict[str, ExpertTensor]:
    """Finds the tensors that hold experts; all others are dense.

    Experts come either one tensor each (``experts.37.up_proj.weight``), or fused in one tensor per
    layer, with an expert in each row of dimension 0.

    Args:
        model: The model, its experts cut down to those of one rank.
        files: The checkpoint.
        layers: The cut layers.

    Returns:
        What each holds, by its name on disk.

    Raises:
        CheckpointError: A fused tensor has another number of experts than its layer.
    """
    parameters = model.state_dict()
    layer_of = {
        f"{layer.name}.{name}": layer
        for layer in layers
        for name in expert_parameters(model.get_submodule(layer.name))
    }
    target_of = _renamer(model, parameters)
    # Tensors of one expert each that differ in the expert only belong to one parameter, and finding
    # out which one takes longer than reading them.
    known: dict[str, SwappedLayer] = {}
    found: dict[str, ExpertTensor] = {}
    for key, pieces in files.tensors.items():
        of_any_expert, expert = _take_out_expert(key)
        if layer := known.get(of_any_expert):
            found[key] = ExpertTensor(layer, expert)
            continue
        target = target_of(key)
        layer = layer_of.get(target)
        if layer is None:
            continue
        shape = joined_shape(pieces)
        if len(shape) == parameters[target].dim():
            _check_fused(key, shape[0], layer)
            found[key] = ExpertTensor(layer, None)
        else:
            known[of_any_expert] = layer
            found[key] = ExpertTensor(layer, expert)
    return found


def own_tensors(
    model: PreTrainedModel,
    files: CheckpointFiles,
    layers: list[SwappedLayer],
    reader: TensorReader,
) -> dict[str, StoredSlice]:
    """Picks the tensors that this rank's model is made of, unread.

    These are all dense ones and the local experts: their own tensors, or their rows of fused ones.
    Files that hold nothing of it are not opened.

    Args:
        model: The model, its experts already cut down to the local ones.
        files: The checkpoint.
        layers: The cut layers.
        reader: What will read them.

    Returns:
        Tensors by their names on disk.

    Raises:
        CheckpointError: See `expert_tensors`.
    """
    of_experts = expert_tensors(model, files, layers)
    picked: dict[str, StoredSlice] = {}
    for key, pieces in files.tensors.items():
        found = of_experts.get(key)
        if found is not None and found.expert is None:
            picked[key] = StoredSlice(reader, _cut(pieces, found.layer.local_experts))
        elif found is None or found.expert in found.layer.local_experts:
            picked[key] = StoredSlice(reader, pieces)
    return picked


def _renamer(model: PreTrainedModel, parameters: Mapping[str, Tensor]) -> Callable[[str], str]:
    """Returns transformers' way from a name on disk to that of a parameter."""
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]

    def rename(key: str) -> str:
        return rename_source_key(key, renamings, converters, model.base_model_prefix, parameters)[0]

    return rename


def _cut(pieces: Sequence[StoredTensor], experts: range) -> list[StoredTensor]:
    """Returns where the rows of some experts lie in the pieces of a fused tensor."""
    found, begin = [], 0
    for piece in pieces:
        num_rows = piece.shape[0]
        rows = range(max(experts.start - begin, 0), min(experts.stop - begin, num_rows))
        if rows:
            found.append(piece.cut(rows))
        begin += num_rows
    return found


def _take_out_expert(key: str) -> tuple[str, int | None]:
    """Splits a name at its last number, which is that of the expert if it is a name of one."""
    parts = key.split(".")
    for at in reversed(range(len(parts))):
        if parts[at].isdigit():
            return ".".join((*parts[:at], "*", *parts[at + 1 :])), int(parts[at])
    return key, None


def _check_fused(key: str, num_experts: int, layer: SwappedLayer) -> None:
    if num_experts != layer.num_experts:
        raise CheckpointError(
            f"{key} holds {num_experts} experts, config.json says {layer.num_experts}. The "
            "weights are not those of this config."
        )
