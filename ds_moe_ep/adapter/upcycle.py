"""Puts MoE layers in place of the FFNs of a dense model.

What these layers are is in moe/upcycled.py; which modules are FFNs, in ffn.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ds_moe_ep.adapter.ffn import Ffn, find_ffns
from ds_moe_ep.errors import AdapterError
from ds_moe_ep.moe.upcycled import TopKRouter, UpcycledExperts, UpcycledMoE
from ds_moe_ep.upcycle_settings import UpcycleSettings

__all__ = ["put_upcycled_layers", "select_ffns"]


def put_upcycled_layers(model: nn.Module, settings: UpcycleSettings) -> None:
    """Replaces the FFNs of the chosen layers by MoE layers with uninitialised weights, in place.

    Args:
        model: The dense model; the new layers are on the device and of the dtype of its FFNs.
        settings: Which layers, and what they are to be.

    Raises:
        AdapterError: The model has no such FFNs or layers.
    """
    for ffn in select_ffns(find_ffns(model, settings.ffn_class), settings.layers):
        _replace(model, ffn, settings)


def select_ffns(ffns: list[Ffn], layers: Sequence[int]) -> list[Ffn]:
    """Returns the FFNs of some layers.

    Raises:
        AdapterError: A layer has none; names those that have one.
    """
    of_layer = {ffn.layer: ffn for ffn in ffns}
    if absent := [layer for layer in layers if layer not in of_layer]:
        raise AdapterError(
            f"layer {absent[0]} has no FFN to upcycle: {len(of_layer)} layers have one, from "
            f"{min(of_layer)} to {max(of_layer)}. Name layers among these."
        )
    return [of_layer[layer] for layer in layers]


def _replace(model: nn.Module, ffn: Ffn, settings: UpcycleSettings) -> None:
    layout, holder = ffn.layout, ffn.module
    weight = holder.get_submodule(layout.down).weight
    with torch.device(weight.device):
        experts = UpcycledExperts(
            layout,
            ffn.hidden_size,
            settings.expert_width(ffn.intermediate_size),
            settings.num_experts,
            holder.get_submodule(layout.activation),
        )
        router = TopKRouter(ffn.hidden_size, settings.num_experts, settings.top_k)
    moe = UpcycledMoE(experts, router, _dropout(ffn)).to(weight.dtype)
    parent_name, _, attribute = ffn.slot.rpartition(".")
    if ffn.is_inside_layer:
        # The layer calls its three parts in turn: the first now does the work of all.
        for name in (layout.activation, layout.down):
            setattr(holder, name, nn.Identity())
    setattr(model.get_submodule(parent_name), attribute, moe)


def _dropout(ffn: Ffn) -> nn.Module:
    found = [child for child in ffn.module.children() if isinstance(child, nn.Dropout)]
    return found[0] if found and not ffn.is_inside_layer else nn.Identity()
