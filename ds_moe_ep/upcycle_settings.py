"""What config.json says of an upcycled model: which layers have experts, how many, made how.

An upcycled model is a dense Hugging Face model, some of whose FFNs are MoE layers of this package.
Its config.json is that of the dense model and one field more, which only this package reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ds_moe_ep.errors import ModelSpecError, nearest

__all__ = ["METHODS", "UPCYCLE_FIELD", "UpcycleSettings"]

UPCYCLE_FIELD = "ds_moe_ep_upcycle"
"""The field of config.json."""

METHODS = ("copy", "split")
"""copy: every expert is the whole FFN. split: the FFN's neurons are spread over the experts."""


@dataclass(frozen=True)
class UpcycleSettings:
    """How a dense model was made an MoE model.

    Attributes:
        num_experts: Experts of each MoE layer.
        top_k: Experts a token is sent to; their weights sum to 1.
        layers: Indices of the layers with experts, ascending.
        method: One of `METHODS`.
        ffn_class: Class of the FFNs that were replaced, as transformers names it.
    """

    num_experts: int
    top_k: int
    layers: tuple[int, ...]
    method: str
    ffn_class: str

    def expert_width(self, intermediate_size: int) -> int:
        """Returns the width of one expert that comes of an FFN of some width."""
        if self.method == "split":
            return intermediate_size // self.num_experts
        return intermediate_size

    def to_dict(self) -> dict[str, Any]:
        """Returns the value of the field."""
        return {**asdict(self), "layers": list(self.layers)}

    @staticmethod
    def from_dict(value: Any, *, source: str) -> UpcycleSettings:
        """Reads the value of the field.

        Args:
            value: What config.json has there.
            source: Its path, for messages.

        Raises:
            ModelSpecError: With the key at fault, its value, and what it may be.
        """
        if not isinstance(value, Mapping):
            raise _malformed(source, "", value, "an object is needed")
        known = [field.name for field in fields(UpcycleSettings)]
        for key in value:
            if key not in known:
                close = nearest(str(key), known)
                hint = f"did you mean {close}?" if close else f"known are {', '.join(known)}"
                raise _malformed(source, f".{key}", value[key], f"there is no such setting; {hint}")
        for key in known:
            if key not in value:
                raise _malformed(source, f".{key}", None, "it is missing")
        num_experts = _whole_number(value, "num_experts", source)
        top_k = _whole_number(value, "top_k", source)
        if top_k > num_experts:
            raise _malformed(source, ".top_k", top_k, f"more than num_experts={num_experts}")
        layers = value["layers"]
        if not (
            isinstance(layers, list)
            and layers
            and all(type(layer) is int and layer >= 0 for layer in layers)
            and layers == sorted(set(layers))
        ):
            raise _malformed(source, ".layers", layers, "layer numbers are needed, ascending")
        if value["method"] not in METHODS:
            raise _malformed(source, ".method", value["method"], f"use one of {', '.join(METHODS)}")
        if not isinstance(value["ffn_class"], str):
            raise _malformed(source, ".ffn_class", value["ffn_class"], "a class name is needed")
        return UpcycleSettings(
            num_experts, top_k, tuple(layers), value["method"], value["ffn_class"]
        )


def _whole_number(value: Mapping[str, Any], key: str, source: str) -> int:
    number = value[key]
    if type(number) is not int or number < 1:
        raise _malformed(source, f".{key}", number, "a whole number of at least 1 is needed")
    return number


def _malformed(source: str, key: str, value: Any, problem: str) -> ModelSpecError:
    return ModelSpecError(f"{source}: {UPCYCLE_FIELD}{key}={value!r}: {problem}")
