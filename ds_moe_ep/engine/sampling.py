"""Sampling that depends on a prompt's id and the seed, not on the batch or rank it lands in.

transformers' own warpers shape the distribution; only the draw is ours.
"""

# Shapes: B prompts of a batch, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

__all__ = ["SeededDraw", "sampling_processors"]


class SeededDraw(LogitsProcessor):
    """Draws one token per row, by inverting the cumulative distribution, and leaves only that.

    Used with greedy decoding, which then picks it. Each row has its own random stream.

    Args:
        ids: Prompt ids, one a row.
        seed: The user's seed.
    """

    def __init__(self, ids: Sequence[str], seed: int) -> None:
        self._streams = [
            torch.Generator().manual_seed(_stream_seed(seed, prompt_id)) for prompt_id in ids
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Returns scores ``[B, V]`` that are -inf but for the drawn token of each row."""
        drawn_B = torch.stack(
            [torch.rand((), generator=stream, dtype=torch.float64) for stream in self._streams]
        )
        cumulative_BV = scores.double().softmax(dim=-1).cumsum(dim=-1)
        # Scaled by the true total, so that rounding never points past the last token.
        target_B1 = drawn_B.to(scores.device)[:, None] * cumulative_BV[:, -1:]
        token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B1, 0.0)


def sampling_processors(
    ids: Sequence[str], *, temperature: float, top_p: float, seed: int
) -> LogitsProcessorList:
    """Returns the processors for one batch: none for temperature 0, which is greedy decoding."""
    if temperature == 0.0:
        return LogitsProcessorList()
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_p < 1.0:
        warpers.append(TopPLogitsWarper(top_p))
    return LogitsProcessorList([*warpers, SeededDraw(ids, seed)])


def _stream_seed(seed: int, prompt_id: str) -> int:
    digest = hashlib.sha256(f"{seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch takes 63 bits without a sign
