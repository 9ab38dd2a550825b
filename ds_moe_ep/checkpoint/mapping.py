"""Which expert a tensor of a checkpoint belongs to, and so which tensors one rank reads.

transformers' conversion mapping says which parameter a tensor belongs to; nothing here knows a
model family.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import StoredTensor, joined_shape
from ds_moe_ep.errors import CheckpointError
from ds_moe_ep.moe.experts import expert_parameters

__all__ = ["ExpertTensor", "JoinedSlices", "TensorSlice", "expert_tensors", "own_tensors"]


@dataclass(frozen=True)
class ExpertTensor:
    """What a tensor on disk holds of the experts of a layer.

    Attributes:
        layer: The layer.
        expert: The expert it is of; None if it holds all of the layer's, in dimension 0.
    """

    layer: SwappedLayer
    expert: int | None


class TensorSlice:
    """A tensor on disk, or some rows of its dimension 0, that is read when indexed with ``...``.

    It stands in for safetensors' own slice object in transformers' loader.

    Args:
        source: safetensors' slice object.
        rows: What to read of dimension 0; None for all of it.
    """

    def __init__(self, source: Any, rows: range | None = None) -> None:
        self._source, self._rows = source, rows

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Reads the bytes."""
        if self._rows is None:
            return self._source[...]
        return self._source[self._rows.start : self._rows.stop]

    def get_shape(self) -> list[int]:
        """Returns the shape of what would be read."""
        shape = list(self._source.get_shape())
        return shape if self._rows is None else [len(self._rows), *shape[1:]]

    def get_dtype(self) -> str:
        """Returns safetensors' name of the dtype on disk."""
        return self._source.get_dtype()


class JoinedSlices:
    """Slices of several files that follow each other in dimension 0, read when indexed.

    Args:
        slices: At least one.
    """

    def __init__(self, slices: Sequence[TensorSlice]) -> None:
        self._slices = slices

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Reads the bytes."""
        return torch.cat([part[index] for part in self._slices])

    def get_shape(self) -> list[int]:
        """Returns the shape of what would be read."""
        shapes = [part.get_shape() for part in self._slices]
        return [sum(shape[0] for shape in shapes), *shapes[0][1:]]

    def get_dtype(self) -> str:
        """Returns safetensors' name of the dtype on disk."""
        return self._slices[0].get_dtype()


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
    conversions = get_model_conversion_mapping(model)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    layer_of = {
        f"{layer.name}.{name}": layer
        for layer in layers
        for name in expert_parameters(model.get_submodule(layer.name))
    }
    found: dict[str, ExpertTensor] = {}
    for key, pieces in files.tensors.items():
        target, _ = rename_source_key(
            key, renamings, converters, model.base_model_prefix, parameters
        )
        layer = layer_of.get(target)
        if layer is None:
            continue
        shape = joined_shape(pieces)
        if len(shape) == parameters[target].dim():
            _check_fused(key, shape[0], layer)
            found[key] = ExpertTensor(layer, None)
        else:
            found[key] = ExpertTensor(layer, _expert_index(key))
    return found


def own_tensors(
    model: PreTrainedModel, files: CheckpointFiles, layers: list[SwappedLayer]
) -> dict[str, TensorSlice | JoinedSlices]:
    """Picks the tensors that this rank's model is made of, unread.

    These are all dense ones and the local experts: their own tensors, or their rows of fused ones.
    Files that hold nothing of it are not opened.

    Args:
        model: The model, its experts already cut down to the local ones.
        files: The checkpoint.
        layers: The cut layers.

    Returns:
        Tensors by their names on disk.

    Raises:
        CheckpointError: See `expert_tensors`.
    """
    of_experts = expert_tensors(model, files, layers)
    opened: dict[Path, Any] = {}
    picked: dict[str, TensorSlice | JoinedSlices] = {}
    for key, pieces in files.tensors.items():
        found = of_experts.get(key)
        if found is not None and found.expert is None:
            wanted = list(_rows_of(pieces, found.layer.local_experts))
        elif found is None or found.expert in found.layer.local_experts:
            wanted = [(piece, None) for piece in pieces]
        else:
            continue
        for piece, _ in wanted:
            if piece.path not in opened:
                opened[piece.path] = safe_open(piece.path, framework="pt")
        slices = [TensorSlice(opened[piece.path].get_slice(key), rows) for piece, rows in wanted]
        picked[key] = slices[0] if len(slices) == 1 else JoinedSlices(slices)
    return picked


def _rows_of(
    pieces: Sequence[StoredTensor], experts: range
) -> Iterator[tuple[StoredTensor, range | None]]:
    """Yields in which pieces of a fused tensor, and there in which rows, some experts lie."""
    begin = 0
    for piece in pieces:
        num_rows = piece.shape[0]
        rows = range(max(experts.start - begin, 0), min(experts.stop - begin, num_rows))
        if rows:
            yield piece, rows
        begin += num_rows


def _expert_index(key: str) -> int:
    """Returns the expert a per-expert tensor belongs to: the last number in its name."""
    return int([part for part in key.split(".") if part.isdigit()][-1])


def _check_fused(key: str, num_experts: int, layer: SwappedLayer) -> None:
    if num_experts != layer.num_experts:
        raise CheckpointError(
            f"{key} holds {num_experts} experts, config.json says {layer.num_experts}. The "
            "weights are not those of this config."
        )
