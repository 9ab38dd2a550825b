"""Finds the FFNs of a dense model, and which of their matrices is which.

No table of families: an FFN is recognised by its shape and then tried. A small copy of the module,
with random matrices, must compute what `FfnLayout` says, or it is not one.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from ds_moe_ep.errors import AdapterError
from ds_moe_ep.moe.upcycled import FfnLayout

__all__ = ["Ffn", "find_ffns"]

_Linear: TypeAlias = nn.Linear | Conv1D

# Layers that have an FFN's matrices as attributes of their own: class -> (up, activation, down).
_INSIDE_LAYER = {"OPTDecoderLayer": ("fc1", "activation_fn", "fc2")}
_IN_A_LAYER = re.compile(r"(?P<stack>.*?)\.(?P<layer>\d+)(\..+)?$")
# Sizes of the trial: no two are the same, so that no matrix passes for another.
_TRIAL_ROWS, _TRIAL_HIDDEN, _TRIAL_WIDTH = 5, 4, 6


@dataclass(frozen=True)
class Ffn:
    """An FFN of a model.

    Attributes:
        layer: Index of its layer.
        name: Name of the module that holds its matrices: the FFN, or the layer itself.
        module: That module.
        layout: Which of its attributes are what.
        is_inside_layer: Whether the matrices are the layer's own attributes.
        hidden_size: Width of what goes in and out.
        intermediate_size: Width within.
    """

    layer: int
    name: str
    module: nn.Module
    layout: FfnLayout
    is_inside_layer: bool
    hidden_size: int
    intermediate_size: int

    @property
    def slot(self) -> str:
        """Name under which an MoE layer takes its place."""
        return f"{self.name}.{self.layout.up[0]}" if self.is_inside_layer else self.name


def find_ffns(model: nn.Module, ffn_class: str | None = None) -> list[Ffn]:
    """Finds the FFNs of a model's layers, all of one class.

    Args:
        model: A transformers model, on any device; its values are not read.
        ffn_class: Name of the class; by default the only one that is an FFN.

    Returns:
        One for each layer that has one, in order.

    Raises:
        AdapterError: No module of the class, or of any class, is an FFN that can be upcycled, or
            several classes are; names the classes there are.
    """
    found: dict[str, list[Ffn]] = {}
    problems: dict[str, str] = {}
    layouts: dict[str, FfnLayout | None] = {}
    for name, module in model.named_modules():
        place = _IN_A_LAYER.match(name)
        kind = type(module).__name__
        if place is None or (ffn_class is not None and kind != ffn_class):
            continue
        if kind not in layouts:
            layouts[kind], problems[kind] = _understand(module)
        layout = layouts[kind]
        if layout is not None:
            sizes = _sizes(module, layout)
            inside = kind in _INSIDE_LAYER
            ffn = Ffn(int(place["layer"]), name, module, layout, inside, *sizes)
            found.setdefault(kind, []).append(ffn)
    if len(found) != 1:
        raise _refusal(model, ffn_class, sorted(found), problems)
    (ffns,) = found.values()
    stacks = sorted({_IN_A_LAYER.match(ffn.name)["stack"] for ffn in ffns})  # type: ignore[index]
    if len({ffn.layer for ffn in ffns}) < len(ffns):
        raise AdapterError(
            f"{type(model).__name__} has {len(ffns)} FFNs of class {type(ffns[0].module).__name__} "
            f"in {', '.join(stacks)}, some layers with more than one: which is to have experts "
            "cannot be told by layer. Such a model cannot be upcycled."
        )
    return ffns


def _refusal(
    model: nn.Module, ffn_class: str | None, found: list[str], problems: dict[str, str]
) -> AdapterError:
    name = type(model).__name__
    if found:
        return AdapterError(
            f"{name} has FFNs of {len(found)} classes: {', '.join(found)}. Name the one to "
            f"upcycle: --ffn-class {found[0]}."
        )
    if ffn_class in problems:
        return AdapterError(
            f"--ffn-class {ffn_class}: it cannot be upcycled: {problems[ffn_class]}. An FFN is two "
            "linear layers around an activation, or three with a gate."
        )
    candidates = sorted(
        {
            type(module).__name__
            for module_name, module in model.named_modules()
            if _IN_A_LAYER.match(module_name) and _linear_layers(module)
        }
    )
    asked = f"no layer of class {ffn_class}" if ffn_class else "no FFN of a kind that is known"
    return AdapterError(
        f"{name} has {asked}. Its layers hold these classes with linear layers: "
        f"{', '.join(candidates) or 'none'}. Name the one that is the FFN: --ffn-class NAME."
    )


def _understand(module: nn.Module) -> tuple[FfnLayout | None, str]:
    """Returns the layout of a module, or None and why it has none."""
    linears = _linear_layers(module)
    if named := _INSIDE_LAYER.get(type(module).__name__):
        up, activation, down = named
        linears = {name: linears[name] for name in (up, down)}
        layout = FfnLayout((up,), down, activation, False, _has_bias(linears), False)
        return layout, ""
    if len(linears) not in (2, 3):
        return None, f"it has {len(linears)} linear layers of its own"
    others = [
        name
        for name, child in module.named_children()
        if name not in linears and not isinstance(child, (nn.Dropout, nn.Identity))
    ]
    if len(others) != 1 or module.get_submodule(others[0]).state_dict():
        return None, f"beside linear layers it has {', '.join(others) or 'no activation module'}"
    if len({isinstance(linear, Conv1D) for linear in linears.values()}) > 1:
        return None, "its linear layers are of different kinds"
    if len({linear.bias is None for linear in linears.values()}) > 1:
        return None, "only some of its linear layers have a bias"
    for layout in _guesses(linears, others[0]):
        if not _computes(module, linears, layout):
            continue
        if layout.has_gate and layout.is_transposed:
            return None, "it has a gate, and its matrices are transposed"
        return layout, ""
    return None, "it computes something else"


def _linear_layers(module: nn.Module) -> dict[str, _Linear]:
    return {
        name: child
        for name, child in module.named_children()
        if isinstance(child, (nn.Linear, Conv1D))
    }


def _has_bias(linears: dict[str, _Linear]) -> bool:
    return all(linear.bias is not None for linear in linears.values())


def _shape(linear: _Linear) -> tuple[int, int]:
    """Returns the widths of what goes in and comes out."""
    first, second = linear.weight.shape
    return (first, second) if isinstance(linear, Conv1D) else (second, first)


def _guesses(linears: dict[str, _Linear], activation: str) -> Iterator[FfnLayout]:
    """Yields the layouts that the shapes allow."""
    is_transposed = isinstance(next(iter(linears.values())), Conv1D)
    has_bias = _has_bias(linears)
    for *up, down in itertools.permutations(linears):
        width_in, width_out = _shape(linears[down])
        ups = [_shape(linears[name]) for name in up]
        if ups == [(width_out, width_in)] * len(up):
            has_gate = len(up) == 2
        elif ups == [(width_out, 2 * width_in)]:
            has_gate = True
        else:
            continue
        yield FfnLayout(tuple(up), down, activation, has_gate, has_bias, is_transposed)


def _computes(module: nn.Module, linears: dict[str, _Linear], layout: FfnLayout) -> bool:
    """Tries whether a module, with small matrices in place of its own, follows a layout."""
    width_up = _TRIAL_WIDTH * (2 if layout.has_gate and len(layout.up) == 1 else 1)
    with torch.device("cpu"), torch.random.fork_rng(devices=()), torch.no_grad():
        torch.manual_seed(0)
        rows = torch.randn(_TRIAL_ROWS, _TRIAL_HIDDEN)
        try:
            small = {
                name: _small_like(linear, _TRIAL_HIDDEN, width_up)
                if name in layout.up
                else _small_like(linear, _TRIAL_WIDTH, _TRIAL_HIDDEN)
                for name, linear in linears.items()
            }
            actual = _with(module, small)(rows)
        except (AttributeError, RuntimeError, TypeError, ValueError):  # it takes something else
            return False
        expected = _formula(rows, small, layout, module.get_submodule(layout.activation))
    if not isinstance(actual, Tensor) or actual.shape != expected.shape:
        return False
    return torch.allclose(actual, expected, rtol=1e-4, atol=1e-5)


def _with(module: nn.Module, small: Mapping[str, nn.Module]) -> nn.Module:
    """Returns the module with other linear layers and without dropout; it stays what it is."""
    trial = copy.copy(module)
    trial.__dict__["_modules"] = {
        name: small.get(name, nn.Identity() if isinstance(child, nn.Dropout) else child)
        for name, child in module.named_children()
    }
    trial.training = False
    return trial


def _small_like(linear: _Linear, width_in: int, width_out: int) -> _Linear:
    small: _Linear
    if isinstance(linear, Conv1D):
        small = Conv1D(width_out, width_in)
    else:
        # Of the same class: what a subclass computes else must not go unnoticed.
        small = type(linear)(width_in, width_out, bias=linear.bias is not None)
    for parameter in small.parameters():
        parameter.normal_()
    return small


def _formula(
    rows: Tensor, linears: Mapping[str, _Linear], layout: FfnLayout, activation: nn.Module
) -> Tensor:
    def linear(name: str, x: Tensor) -> Tensor:
        weight = linears[name].weight
        return functional.linear(
            x, weight.t() if layout.is_transposed else weight, linears[name].bias
        )

    up = torch.cat([linear(name, rows) for name in layout.up], dim=-1)
    if layout.has_gate:
        gate, up = up.chunk(2, dim=-1)
        return linear(layout.down, activation(gate) * up)
    return linear(layout.down, activation(up))


def _sizes(module: nn.Module, layout: FfnLayout) -> tuple[int, int]:
    down = module.get_submodule(layout.down)
    assert isinstance(down, (nn.Linear, Conv1D))
    intermediate_size, hidden_size = _shape(down)
    return hidden_size, intermediate_size
