"""How transformers' ``generate`` is told to treat each row of a batch as if it were alone.

transformers has one set of settings, one length and one count of tokens for a whole batch, padding
included; what is here is of one row. Batches are made in tasks.py.
"""

# Shapes: B rows of a batch, L padded length with new tokens, V vocabulary

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria

__all__ = [
    "Rooms",
    "Waits",
    "decoding_config",
    "end_ids",
    "own_processors",
    "positions_within",
    "warn_of_ignored",
    "without_own_settings",
]

# A model's own settings that would change tokens, but that nobody can ask for here.
_IGNORED = (
    "num_beams",
    "num_return_sequences",
    "penalty_alpha",
    "dola_layers",
    "constraints",
    "force_words_ids",
    "guidance_scale",
    "stop_strings",
    "max_time",
)


def end_ids(config: GenerationConfig) -> set[int]:
    """Returns the tokens that end a completion."""
    end = config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def warn_of_ignored(own: GenerationConfig) -> None:
    """Warns, by name, of a model's own settings that would change tokens but are not followed."""
    given = {name: getattr(own, name, None) for name in _IGNORED}
    ignored = [f"{name}={value!r}" for name, value in given.items() if value and value != 1]
    if ignored:
        warnings.warn(
            f"generation_config.json: {', '.join(ignored)} ignored: each prompt has one completion "
            "of one token after the other, which ends at an end token or --max-new-tokens.",
            stacklevel=2,
        )


def decoding_config(own: GenerationConfig, max_new_tokens: int) -> GenerationConfig:
    """Returns greedy decoding with the model's own special tokens, and nothing else of its own.

    Args:
        own: The model's settings.
        max_new_tokens: Most new tokens of a row of the batch.
    """
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,  # DeepSpeed reads it
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=0,  # masked, so any token will do; its own may be outside of the vocabulary
        disable_compile=True,  # as transformers would compile passes with a static cache
    )


@contextmanager
def without_own_settings(model: Any) -> Iterator[None]:
    """Keeps ``generate`` from adding the model's own settings to those that it is given."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


@contextmanager
def positions_within(model: Any, context_length: int) -> Iterator[None]:
    """Keeps positions within the context in the passes of a model.

    A row that has ended is carried along until the others have. Beyond the context there are no
    learned positions, and rotary frequencies may follow the last position of a batch.

    Args:
        model: The model.
        context_length: Positions that it has.
    """

    def clamp(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        positions = kwargs.get("position_ids")
        if positions is None:
            return None
        return args, {**kwargs, "position_ids": positions.clamp(max=context_length - 1)}

    hook = model.register_forward_pre_hook(clamp, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class Waits(LogitsProcessor):
    """Waits for a pass before other processors do, which may ask its GPU for results.

    Args:
        wait: Does so, with a bound.
    """

    def __init__(self, wait: Callable[[], None]) -> None:
        self._wait = wait

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns the scores as they are."""
        self._wait()
        return scores


class Rooms(StoppingCriteria):
    """Ends each row of a batch when it has no more room.

    Args:
        rooms: New tokens for which each row has room; 0 for a row without a prompt.
        prompt_len: Padded length of the prompts.
        device: Device of the tokens.
        wait: Called when all of a step is told, before ``generate`` waits for it.
    """

    def __init__(
        self,
        rooms: Sequence[int],
        prompt_len: int,
        device: torch.device,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._rooms_B = torch.tensor(rooms, device=device)
        self._prompt_len, self._wait = prompt_len, wait

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        """Returns which rows have ended, bool ``[B]``; tokens are ``[B, L]``."""
        has_ended_B = input_ids.shape[1] - self._prompt_len >= self._rooms_B
        if self._wait is not None:
            self._wait()
        return has_ended_B


class _OfRows(LogitsProcessor):
    """Applies to each row processors of its own, which see its tokens without the padding.

    Args:
        processors: Those of each row.
        num_padding: Tokens of padding of each row.
    """

    def __init__(
        self, processors: Sequence[LogitsProcessorList], num_padding: Sequence[int]
    ) -> None:
        self._rows = list(zip(processors, num_padding, strict=True))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores ``[B, V]``; tokens are ``[B, L]``."""
        return torch.cat(
            [
                processors(input_ids[row : row + 1, padding:], scores[row : row + 1])
                for row, (processors, padding) in enumerate(self._rows)
            ]
        )


def own_processors(
    model: Any, prompts: Sequence[Sequence[int]], rooms: Sequence[int]
) -> list[LogitsProcessor]:
    """Returns what applies the model's own settings, such as penalties, to each row of a batch.

    Args:
        model: The model.
        prompts: Tokens of each row.
        rooms: New tokens for which each has room.

    Returns:
        Nothing where the model has no such settings.
    """
    of_rows = [_own_of_row(model, ids, room) for ids, room in zip(prompts, rooms, strict=True)]
    longest = max(map(len, prompts))
    return [_OfRows(of_rows, [longest - len(ids) for ids in prompts])] if any(of_rows) else []


def _own_of_row(model: Any, ids: Sequence[int], room: int) -> LogitsProcessorList:
    """What transformers' ``generate`` would apply to a prompt that it is given alone."""
    config = deepcopy(model.generation_config)
    config.do_sample = False
    config.guidance_scale = None  # it would run the model
    config.max_length = len(ids) + room
    if config.min_new_tokens is not None:
        config.min_length = len(ids) + config.min_new_tokens
    model._prepare_special_tokens(config, device=model.device)
    return model._get_logits_processor(
        config,
        input_ids_seq_length=len(ids),
        encoder_input_ids=torch.tensor([ids], device=model.device),
        device=model.device,
    )
