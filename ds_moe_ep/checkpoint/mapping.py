"""Which tensors of a checkpoint one rank reads: all dense ones, and of the experts its own.

transformers' conversion mapping says which parameter a tensor belongs to; nothing here knows a
model family.
"""

from __future__ import annotations

from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ds_moe_ep.adapter.replace import SwappedLayer, expert_parameters
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.errors import CheckpointError

__all__ = ["TensorSlice", "own_tensors"]


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


def own_tensors(
    model: PreTrainedModel, files: CheckpointFiles, layers: list[SwappedLayer]
) -> dict[str, TensorSlice]:
    """Picks the tensors that this rank's model is made of, unread.

    Experts come either one tensor each (``experts.37.up_proj.weight``), then only the local ones
    are picked, or fused in one tensor per layer, then only the local slice of dimension 0 is.

    Args:
        model: The model, its experts already cut down to the local ones.
        files: The checkpoint.
        layers: The cut layers.

    Returns:
        Tensors by their names on disk.
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
    opened: dict[str, Any] = {}
    picked: dict[str, TensorSlice] = {}
    for key, file in files.file_of.items():
        if file not in opened:
            opened[file] = safe_open(files.folder / file, framework="pt")
        source = opened[file].get_slice(key)
        target, _ = rename_source_key(
            key, renamings, converters, model.base_model_prefix, parameters
        )
        layer = layer_of.get(target)
        if layer is None:
            picked[key] = TensorSlice(source)
        elif len(source.get_shape()) == parameters[target].dim():
            _check_fused(key, source.get_shape()[0], layer)
            picked[key] = TensorSlice(source, layer.local_experts)
        elif _expert_index(key) in layer.local_experts:
            picked[key] = TensorSlice(source)
    return picked


def _expert_index(key: str) -> int:
    """Returns the expert a per-expert tensor belongs to: the last number in its name."""
    return int([part for part in key.split(".") if part.isdigit()][-1])


def _check_fused(key: str, num_experts: int, layer: SwappedLayer) -> None:
    if num_experts != layer.num_experts:
        raise CheckpointError(
            f"{key} holds {num_experts} experts, config.json says {layer.num_experts}. The "
            "weights are not those of this config."
        )
