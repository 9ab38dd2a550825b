"""What is done with one batch of prompts: generate a completion for each, or score each.

Generation is transformers' ``generate``; these functions pad, call it, and cut its rows into
results. What it is told is in decoding.py.
"""

# Shapes: B rows of a batch, L padded length, V vocabulary

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LogitsProcessorList, PreTrainedTokenizerBase, StoppingCriteriaList

from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.decoding import (
    Rooms,
    Waits,
    decoding_config,
    end_ids,
    own_processors,
    positions_within,
    without_own_settings,
)
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.sampling import sampling_processors

__all__ = [
    "EncodedPrompt",
    "GenerateSettings",
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
    model = engine.module
    rooms = [
        min(settings.max_new_tokens, settings.context_length - len(encoded.token_ids))
        for encoded in batch
    ]
    config = decoding_config(model.generation_config, max(rooms))
    num_empty = graph.batch_size - len(batch) if graph is not None else 0
    rooms += [0] * num_empty
    no_prompt = (config.pad_token_id,)
    rows = [*(encoded.token_ids for encoded in batch), *[no_prompt] * num_empty]
    input_ids_BL, mask_BL = pad_left(rows, config.pad_token_id, model.device)
    longest = input_ids_BL.shape[1]
    if live_rows is not None:
        is_prompt_B = torch.arange(len(rows), device=model.device) < len(batch)
        live_rows.start_batch(mask_BL * is_prompt_B[:, None], rooms)
    if graph is not None:
        graph.cache.reset()
    processors = [
        *own_processors(model, rows, rooms),
        *sampling_processors(
            [*(encoded.prompt.id for encoded in batch), *[""] * num_empty],
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=settings.seed,
        ),
    ]
    if processors and graph is not None:
        processors.insert(0, Waits(graph.wait))
    with (
        torch.no_grad(),
        without_own_settings(model),
        positions_within(model, settings.context_length),
    ):
        output_BL = engine.generate(
            input_ids=input_ids_BL,
            attention_mask=mask_BL,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            past_key_values=None if graph is None else graph.cache,
            stopping_criteria=StoppingCriteriaList(
                [Rooms(rooms, longest, model.device, None if graph is None else graph.wait)]
            ),
            synced_gpus=False,
        )
    ends = end_ids(config)
    return [
        _result(encoded, row[:room], ends, tokenizer)
        for encoded, row, room in zip(batch, output_BL[:, longest:].tolist(), rooms, strict=False)
    ]


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
    ids = [torch.tensor(row, dtype=torch.int64) for row in rows]
    pad = functools.partial(pad_sequence, batch_first=True, padding_side="left")
    ids_BL = pad(ids, padding_value=pad_token_id)
    mask_BL = pad([torch.ones_like(row) for row in ids])
    return ids_BL.to(device), mask_BL.to(device)


def _result(
    encoded: EncodedPrompt,
    row: list[int],
    ends: set[int],
    tokenizer: PreTrainedTokenizerBase | None,
) -> GenerateResult:
    """Makes a result of the new tokens of a prompt, of which those behind an end token are none."""
    token_ids, reason = _cut(row, ends)
    text = tokenizer.decode(token_ids, skip_special_tokens=True) if tokenizer is not None else None
    return GenerateResult(
        id=encoded.prompt.id,
        prompt=encoded.prompt.text,
        token_ids=tuple(token_ids),
        completion=text,
        finish_reason=reason,
    )


def _cut(token_ids: list[int], ends: set[int]) -> tuple[list[int], Literal["stop", "length"]]:
    """Cuts a row after its first end token."""
    for position, token in enumerate(token_ids):
        if token in ends:
            return token_ids[: position + 1], "stop"
    return token_ids, "length"
