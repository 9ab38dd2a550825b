"""What is done with one batch of prompts: generate a completion for each, or score each.

Generation is transformers' ``generate``; these functions pad, call it, and cut its rows into
results.
"""

# Shapes: B rows of a batch, L padded length, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.sampling import sampling_processors

__all__ = [
    "EncodedPrompt",
    "GenerateSettings",
    "end_ids",
    "generate_batch",
    "pad_left",
    "score_batch",
    "score_tokens",
]


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt and its tokens."""

    prompt: Prompt
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerateSettings:
    """How completions are made.

    Attributes:
        max_new_tokens: Tokens a completion may have.
        context_length: Tokens a prompt and its completion may have together.
        temperature: 0 is greedy decoding.
        top_p: Share of the probability that is kept, 1 for all.
        seed: Seed of the draws.
    """

    max_new_tokens: int
    context_length: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


def generate_batch(
    engine: Any,
    batch: Sequence[EncodedPrompt],
    settings: GenerateSettings,
    tokenizer: PreTrainedTokenizerBase | None,
    live_rows: LiveRows | None = None,
    graph: DecodeGraph | None = None,
) -> list[GenerateResult]:
    """Generates a completion for each prompt of a batch.

    Args:
        engine: What ``deepspeed.init_inference`` returned.
        batch: The prompts.
        settings: How.
        tokenizer: Turns tokens into text; without one completions are None.
        live_rows: Is told of the batch.
        graph: Replays decode passes; it settles how many rows a batch has, with or without prompts.

    Returns:
        A result per prompt, in the order of the batch. ``token_ids`` holds the end token if it was
        reached.
    """
    longest = max(len(encoded.token_ids) for encoded in batch)
    config = _generation_config(engine.module.generation_config, settings)
    num_empty = graph.batch_size - len(batch) if graph is not None else 0
    no_prompt = (config.pad_token_id,)
    input_ids_BL, mask_BL = pad_left(
        [*(encoded.token_ids for encoded in batch), *[no_prompt] * num_empty],
        config.pad_token_id,
        engine.module.device,
    )
    is_prompt_B = torch.arange(len(mask_BL), device=mask_BL.device) < len(batch)
    if live_rows is not None:
        live_rows.start_batch(mask_BL * is_prompt_B[:, None])
    if graph is not None:
        graph.cache.reset()
    with torch.no_grad():
        output_BL = engine.generate(
            input_ids=input_ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=sampling_processors(
                [*(encoded.prompt.id for encoded in batch), *[""] * num_empty],
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed,
            ),
            past_key_values=None if graph is None else graph.cache,
            stopping_criteria=StoppingCriteriaList([_NoPrompt(is_prompt_B)] if num_empty else []),
            synced_gpus=False,
        )
    ends = end_ids(config)
    results = []
    for encoded, row in zip(batch, output_BL[: len(batch), longest:].tolist(), strict=True):
        room = min(settings.max_new_tokens, settings.context_length - len(encoded.token_ids))
        token_ids, reason = _cut(row[:room], ends)
        text = (
            tokenizer.decode(token_ids, skip_special_tokens=True) if tokenizer is not None else None
        )
        results.append(
            GenerateResult(
                id=encoded.prompt.id,
                prompt=encoded.prompt.text,
                token_ids=tuple(token_ids),
                completion=text,
                finish_reason=reason,
            )
        )
    return results


class _NoPrompt(StoppingCriteria):
    """Ends rows that have no prompt before they begin."""

    def __init__(self, is_prompt_B: Tensor) -> None:
        self._has_ended_B = ~is_prompt_B

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return self._has_ended_B


def score_batch(
    engine: Any, batch: Sequence[EncodedPrompt], live_rows: LiveRows | None = None
) -> list[ScoreResult]:
    """Computes the natural log probability of every token of each prompt but its first.

    Args:
        engine: What ``deepspeed.init_inference`` returned.
        batch: The prompts.
        live_rows: Is told of the batch.

    Returns:
        A result per prompt, in the order of the batch.
    """
    input_ids_BL, mask_BL = pad_left(
        [encoded.token_ids for encoded in batch], 0, engine.module.device
    )
    if live_rows is not None:
        live_rows.start_batch(mask_BL)
    with torch.no_grad():
        logits_BLV = engine(
            input_ids=input_ids_BL,
            attention_mask=mask_BL,
            position_ids=(mask_BL.cumsum(dim=1) - 1).clamp(min=0),
            use_cache=False,
        ).logits
    longest = input_ids_BL.shape[1]
    return [
        score_tokens(encoded, logits_LV[longest - len(encoded.token_ids) :])
        for encoded, logits_LV in zip(batch, logits_BLV, strict=True)
    ]


def score_tokens(encoded: EncodedPrompt, logits_LV: Tensor) -> ScoreResult:
    """Computes the natural log probability of every token of a prompt but its first.

    Args:
        encoded: The prompt.
        logits_LV: What a model gave after each of its tokens.
    """
    ids_L = torch.tensor(encoded.token_ids, device=logits_LV.device)
    # One prompt at a time: a float32 log-softmax of a whole batch would double the largest tensor
    # of the pass.
    logprobs_LV = logits_LV[:-1].float().log_softmax(dim=-1)
    scored_L = logprobs_LV.gather(1, ids_L[1:, None])[:, 0]
    return ScoreResult(
        id=encoded.prompt.id,
        num_tokens=len(encoded.token_ids),
        logprob=float(scored_L.double().sum()),
        token_logprobs=tuple(scored_L.tolist()),
    )


def pad_left(
    rows: Sequence[Sequence[int]], pad_token_id: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Pads rows of token ids on the left to the longest.

    Returns:
        Token ids and attention mask (1 for tokens, 0 for padding), int64 ``[B, L]``.
    """
    longest = max(len(row) for row in rows)
    ids_BL = torch.tensor(
        [[pad_token_id] * (longest - len(row)) + list(row) for row in rows], device=device
    )
    mask_BL = torch.tensor(
        [[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device
    )
    return ids_BL, mask_BL


def _generation_config(own: GenerationConfig, settings: GenerateSettings) -> GenerationConfig:
    """The model's own settings (end tokens, penalties) with the user's way of decoding."""
    config = deepcopy(own)
    config.update(
        do_sample=False, temperature=None, top_p=None, top_k=None, max_length=None, num_beams=1
    )
    config.max_new_tokens = settings.max_new_tokens
    config.disable_compile = True  # as transformers would compile passes with a static cache
    if config.pad_token_id is None:
        config.pad_token_id = min(end_ids(config), default=0)
    return config


def end_ids(config: GenerationConfig) -> set[int]:
    """Returns the tokens that end a completion."""
    end = config.eos_token_id
    return set() if end is None else {end} if isinstance(end, int) else set(end)


def _cut(token_ids: list[int], ends: set[int]) -> tuple[list[int], Literal["stop", "length"]]:
    """Cuts a row after its first end token."""
    for position, token in enumerate(token_ids):
        if token in ends:
            return token_ids[: position + 1], "stop"
    return token_ids, "length"
