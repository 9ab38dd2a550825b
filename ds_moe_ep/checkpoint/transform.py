"""Turns tensors as they lie on disk into those of the model in memory, by transformers' own rules.

These rename, stack, fuse and transpose; nothing is cast, so every bit stays. Nothing is read here,
and it works as well on the meta device, to learn names and shapes only.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

__all__ = ["ModelNames"]


class ModelNames:
    """The rules from names and tensors on disk to those of a model; threads may share it.

    Args:
        model: The model, with as many experts as it is to get tensors of: some of the rules compare
            shapes.

    Attributes:
        conversions: The rules as transformers' loader takes them.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters = model.state_dict()
        self.conversions = get_model_conversion_mapping(model)
        self._renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        self._converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        self._converter_of = {pattern: c for c in self._converters for pattern in c.source_patterns}

    def name(self, key: str) -> str:
        """Returns the tensor of the model that a tensor on disk is, or is the first part of."""
        return self._rule(key)[0]

    def transform(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Makes the model's tensors out of those on disk that they are made of.

        Args:
            tensors: By their names on disk; all that one tensor of the model is made of, or none.

        Returns:
            By the names of the model's state dict, and in its shapes. What the model does not know
            is left out.
        """
        rules: dict[str, WeightRenaming | WeightConverter] = {}
        for key in sorted(tensors, key=dot_natural_key):
            name, pattern = self._rule(key)
            if name not in self._parameters:
                continue
            if pattern is None:
                rule = rules.setdefault(name, WeightRenaming(key, name))
            else:
                rule = rules.setdefault(name, deepcopy(self._converter_of[pattern]))
            rule.add_tensor(name, key, pattern or key, tensors[key])
        made: dict[str, Tensor] = {}
        for name, rule in rules.items():
            results = rule.convert(name, model=self._model, config=self._model.config)
            made |= {n: t[0] if isinstance(t, list) else t for n, t in results.items()}
        return {name: tensor for name, tensor in made.items() if name in self._parameters}

    def merge_on_reading(self, key: str) -> None:
        """Lets the rule for a tensor of one expert take all experts in one tensor."""
        _, pattern = self._rule(key)
        if pattern is not None:
            rule = self._converter_of[pattern]
            rule.operations = [
                _MergedOnReading(operation.dim)
                if isinstance(operation, MergeModulelist)
                else operation
                for operation in rule.operations
            ]

    def _rule(self, key: str) -> tuple[str, str | None]:
        base, known = self._model.base_model_prefix, self._parameters
        name, pattern = rename_source_key(key, self._renamings, self._converters, base, known)
        if name not in known and key in known:  # it has its name in the model already
            return rename_source_key(key, [], [], base, known)
        return name, pattern


class _MergedOnReading(MergeModulelist):
    """Stands where transformers would join tensors of one expert each; they are read joined."""

    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        return {
            self.get_target_pattern(len(input_dict), pattern, target_patterns): tensor
            for pattern, (tensor,) in input_dict.items()
        }
