"""Typed access to the fields of a Hugging Face config.json, refusing by name what is malformed.

It knows how values are looked up; what they mean is for model_spec.py and param_counts.py.
"""

from collections.abc import Mapping
from typing import Any

from ds_moe_ep.errors import ModelSpecError
from ds_moe_ep.model_families import (
    FAMILIES,
    FIELD_NAMES,
    OTHER_FAMILIES,
    UNKNOWN_FAMILY,
    UNSUPPORTED,
    Switch,
)
from ds_moe_ep.upcycle_settings import UPCYCLE_FIELD, UpcycleSettings

__all__ = ["HfFields"]


class HfFields:
    """The fields of one config.json, asked for in this project's words.

    A field that is null counts as absent, as it does in transformers' config classes.

    Attributes:
        source: path of the file, for messages.
        model_type: the family's name.
        family: what is known about the family of the language model.
        is_known_family: False where `family` is only the usual block.
        is_nested: whether the language model is one part of a multimodal model.
        upcycled: how the dense model was made an MoE model; None if it was not.
    """

    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        """Look up the family of a parsed config.json.

        Raises:
            ModelSpecError: if there is no model_type, or none that can be supported.
        """
        self._config = config
        self.source = source
        self.model_type = self._model_type()
        if reason := UNSUPPORTED.get(self.model_type):
            raise self.refuse("model_type", reason)
        self.is_nested = self._is_nested()
        family_type = self.model_type
        if self.is_nested:
            # What is said of the whole model stands where the language model says nothing.
            self._config = {**config, **config["text_config"]}
            family_type = config["text_config"].get("model_type", family_type)
        other = OTHER_FAMILIES.get(family_type, UNKNOWN_FAMILY)
        self.family = FAMILIES.get(family_type, other)
        self.is_known_family = family_type in FAMILIES
        value = config.get(UPCYCLE_FIELD)
        self.upcycled = (
            None if value is None else UpcycleSettings.from_dict(value, source=self.source)
        )

    def _model_type(self) -> str:
        model_type = self._config.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ModelSpecError(
                f"{self.source}: model_type={model_type!r}: the name of a model family is needed, "
                "like 'olmoe'"
            )
        return model_type

    def _is_nested(self) -> bool:
        text_config = self._config.get("text_config")
        names = FIELD_NAMES["num_layers"]
        return isinstance(text_config, Mapping) and not any(name in self._config for name in names)

    def refuse(self, field: str, problem: str) -> ModelSpecError:
        """Return the error for a field, as the file spells it, with its value."""
        return ModelSpecError(f"{self.source}: {field}={self._config.get(field)!r}: {problem}")

    def name(self, word: str) -> str:
        """Return how this file spells one of this project's words (its usual name if absent)."""
        names = FIELD_NAMES.get(word, (word,))
        return next((name for name in names if self._config.get(name) is not None), names[0])

    def has(self, word: str) -> bool:
        """Return whether the file gives a value for a word."""
        return self._config.get(self.name(word)) is not None

    def is_null(self, name: str) -> bool:
        """Return whether the file has a field of this name with the value null."""
        return name in self._config and self._config[name] is None

    def integer(
        self,
        word: str,
        default: int | None = None,
        *,
        minimum: int = 1,
        may_be_per_layer: bool = False,
    ) -> int:
        """Return a whole number.

        Args:
            word: this project's word for it.
            default: value where neither the file nor the family's table has one; None refuses then.
            minimum: smallest value accepted.
            may_be_per_layer: a list with the same number for every layer is accepted too.

        Raises:
            ModelSpecError: if it is missing, no whole number, too small, or given with two values.
        """
        names = [
            name for name in FIELD_NAMES.get(word, (word,)) if self._config.get(name) is not None
        ]
        if not names:
            value = self.family.defaults.get(word, default)
            if value is None:
                raise self._missing(word)
            return value
        value = self._config[names[0]]
        if may_be_per_layer and isinstance(value, list) and value:
            if any(other != value[0] for other in value):
                raise self.refuse(names[0], "it must be the same for all layers")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.refuse(names[0], f"a whole number of at least {minimum} is needed")
        for other in names[1:]:
            if self._config[other] not in (value, self._config[names[0]]):
                raise self.refuse(other, f"the file also says {names[0]}={value}; keep one of them")
        return value

    def switch(self, switch: Switch) -> bool:
        """Return whether a part that a field may switch is there.

        Raises:
            ModelSpecError: if the field is neither true nor false.
        """
        if isinstance(switch, bool):
            return switch
        name, default = switch
        value = self._config.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false is needed")
        return value

    def text(self, *names: str) -> str | None:
        """Return the first of these fields that is there, or None.

        Raises:
            ModelSpecError: if it is not a text.
        """
        for name in names:
            value = self._config.get(name)
            if value is not None:
                if not isinstance(value, str):
                    raise self.refuse(name, "a text is needed")
                return value
        return None

    def items(self, name: str, kind: type) -> list[Any]:
        """Return a list whose items are all of one type; empty where the field is absent.

        Raises:
            ModelSpecError: if it is something else.
        """
        value = self._config.get(name)
        if value is None:
            return []
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            raise self.refuse(name, f"a list of {kind.__name__} values is needed")
        return value

    def _missing(self, word: str) -> ModelSpecError:
        wanted = " or ".join(FIELD_NAMES.get(word, (word,)))
        if self.is_known_family:
            hint = "take the config.json that belongs to the checkpoint"
        else:
            known = ", ".join(sorted(FAMILIES))
            hint = f"the family is not known, nor are all the usual fields there; known are {known}"
        return ModelSpecError(
            f"{self.source}: no field {wanted} (model_type {self.model_type!r}): {hint}"
        )
