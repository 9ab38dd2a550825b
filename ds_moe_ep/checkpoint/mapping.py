"""Which expert a tensor of a checkpoint belongs to, and so which tensors one rank reads.

transformers' conversion mapping says which parameter a tensor belongs to; nothing here knows a
model family.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel
from transformers.core_model_loading import WeightTransform

from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.checkpoint.reader import StoredSlice, TensorReader
from ds_moe_ep.checkpoint.transform import ModelNames
from ds_moe_ep.errors import CheckpointError, some
from ds_moe_ep.moe.experts import expert_parameters

__all__ = [
    "ExpertTensor",
    "OwnTensors",
    "check_experts",
    "expert_tensors",
    "own_tensors",
    "rows_of",
]

_ANY = "*"  # stands for the expert in a name
_LAST_NUMBER = re.compile(r"(.*\.)(\d+)(?=\.|$)(.*)")  # greedy: the last that fits


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
        CheckpointError: A fused tensor has another number of experts than its layer, or a tensor
            is of an expert that its layer does not have.
    """
    return _expert_tensors(model, ModelNames(model), files, layers)


def _expert_tensors(
    model: PreTrainedModel, names: ModelNames, files: CheckpointFiles, layers: list[SwappedLayer]
) -> dict[str, ExpertTensor]:
    parameters = model.state_dict()
    layer_of = {
        f"{layer.name}.{name}": layer
        for layer in layers
        for name in expert_parameters(model.get_submodule(layer.name))
    }
    # Tensors of one expert each that differ in the expert only belong to one parameter, and finding
    # out which one takes longer than reading them.
    known: dict[str, SwappedLayer] = {}
    found: dict[str, ExpertTensor] = {}
    for key, pieces in files.tensors.items():
        of_any_expert, expert = _take_out_expert(key)
        if layer := known.get(of_any_expert):
            found[key] = ExpertTensor(layer, expert)
            continue
        target = names.name(key)
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
    if too_many := [
        key
        for key, held in found.items()
        if held.expert is not None and held.expert >= held.layer.num_experts
    ]:
        raise CheckpointError(
            f"{len(too_many)} tensors are of experts that config.json does not have "
            f"({some(too_many)}). {_NOT_OF_THIS_CONFIG}"
        )
    return found


def check_experts(of_experts: Mapping[str, ExpertTensor], layers: Iterable[str]) -> None:
    """Refuses a checkpoint that lacks experts.

    Args:
        of_experts: The tensors that hold experts.
        layers: Names of the layers that must have experts.

    Raises:
        CheckpointError: With the layer and the experts at fault.
    """
    by_layer: dict[str, list[ExpertTensor]] = defaultdict(list)
    for found in of_experts.values():
        by_layer[found.layer.name].append(found)
    for name in layers:
        if not by_layer[name]:
            raise CheckpointError(f"no tensor holds the experts of {name}. {_NOT_OF_THIS_CONFIG}")
        single = Counter(found.expert for found in by_layer[name] if found.expert is not None)
        if not single:
            continue
        num_experts = by_layer[name][0].layer.num_experts
        most = max(single.values())
        if lacking := [expert for expert in range(num_experts) if single[expert] < most]:
            raise CheckpointError(
                f"{name}: expert {lacking[0]} has {single[lacking[0]]} tensors where others have "
                f"{most}; so it is with {len(lacking)} of {num_experts} experts. "
                f"{_NOT_OF_THIS_CONFIG}"
            )


@dataclass(frozen=True)
class OwnTensors:
    """What a rank's model is made of.

    Attributes:
        tensors: Unread, by names that transformers knows. Experts that lie one tensor each are read
            as rows of one tensor, under the name of the first of them.
        conversions: transformers' way from these tensors to the model's parameters.
    """

    tensors: dict[str, StoredSlice]
    conversions: list[WeightTransform]


def own_tensors(
    model: PreTrainedModel,
    files: CheckpointFiles,
    layers: list[SwappedLayer],
    reader: TensorReader,
) -> OwnTensors:
    """Picks the tensors that this rank's model is made of.

    These are all dense ones and the local experts: their own tensors, or their rows of fused ones.
    Files that hold nothing of it are not opened.

    Args:
        model: The model, its experts already cut down to the local ones.
        files: The checkpoint.
        layers: The cut layers.
        reader: What will read them.

    Raises:
        CheckpointError: Experts are missing or of different shapes; see also `expert_tensors`.
    """
    names = ModelNames(model)
    of_experts = _expert_tensors(model, names, files, layers)
    picked: dict[str, StoredSlice] = {}
    merged: dict[str, dict[int, StoredTensor]] = defaultdict(dict)
    owner: dict[str, SwappedLayer] = {}
    for key, pieces in files.tensors.items():
        found = of_experts.get(key)
        if found is None:
            picked[key] = StoredSlice(reader, pieces)
        elif found.expert is None:
            picked[key] = StoredSlice(reader, rows_of(pieces, found.layer.local_experts))
        elif found.expert in found.layer.local_experts:
            of_any_expert, expert = _take_out_expert(key)
            owner[of_any_expert] = found.layer
            (merged[of_any_expert][expert],) = pieces
    for of_any_expert, layer in owner.items():
        first = of_any_expert.replace(_ANY, str(layer.local_experts[0]))
        rows = _as_rows(of_any_expert, merged[of_any_expert], layer.local_experts)
        picked[first] = StoredSlice(reader, rows)
        names.merge_on_reading(first)
    return OwnTensors(picked, names.conversions)


def _as_rows(
    of_any_expert: str, stored: Mapping[int, StoredTensor], experts: Sequence[int]
) -> list[StoredTensor]:
    """Returns the tensors of some experts as rows of one tensor, in the experts' order."""
    if missing := [
        of_any_expert.replace(_ANY, str(expert)) for expert in experts if expert not in stored
    ]:
        raise CheckpointError(
            f"the weights do not fit config.json: {len(missing)} missing: {some(missing)}."
        )
    shapes = {stored[expert].shape for expert in experts}
    if len(shapes) > 1:
        raise CheckpointError(
            f"{of_any_expert} has another shape for some experts than for others: "
            f"{' and '.join(str(list(shape)) for shape in sorted(shapes))}. The weights are not "
            "those of one model."
        )
    return [replace(stored[expert], shape=(1, *stored[expert].shape)) for expert in experts]


def rows_of(pieces: Sequence[StoredTensor], experts: Sequence[int]) -> list[StoredTensor]:
    """Returns where the rows of some experts lie in the pieces of a fused tensor.

    Args:
        pieces: They follow each other in dimension 0.
        experts: The experts, in the order of the rows that are wanted.
    """
    if not isinstance(experts, range):
        return [row for expert in experts for row in rows_of(pieces, range(expert, expert + 1))]
    found, begin = [], 0
    for piece in pieces:
        num_rows = piece.shape[0]
        rows = range(max(experts.start - begin, 0), min(experts.stop - begin, num_rows))
        if rows:
            found.append(piece.cut(rows))
        begin += num_rows
    return found


def _take_out_expert(key: str) -> tuple[str, int]:
    """Splits a name at its last number, which is that of the expert if it is a name of one."""
    found = _LAST_NUMBER.match(key)
    if found is None:
        return key, 0
    before, number, after = found.groups()
    return f"{before}{_ANY}{after}", int(number)


def _check_fused(key: str, num_experts: int, layer: SwappedLayer) -> None:
    if num_experts != layer.num_experts:
        raise CheckpointError(
            f"{key} holds {num_experts} experts, config.json says {layer.num_experts}. "
            f"{_NOT_OF_THIS_CONFIG}"
        )


_NOT_OF_THIS_CONFIG = "The weights are not those of this config."
