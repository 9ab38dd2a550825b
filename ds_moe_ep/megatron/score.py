"""Scores prompts with Megatron's GPTModel: which rank does what in which pass, and the pass itself.

All ranks go through each pass of the model together, since each holds experts that the others need.
"""

# Shapes: B prompts of a batch, L padded length, V vocabulary

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_moe_ep.engine.outputs import ScoreResult
from ds_moe_ep.engine.schedule import spread
from ds_moe_ep.engine.tasks import EncodedPrompt, score_tokens

__all__ = ["Pass", "megatron_logits", "plan_passes", "score_pass"]


@dataclass(frozen=True)
class Pass:
    """What one rank does while all ranks go through the model once.

    Attributes:
        indices: Its prompts, by their index in the input; none if it only lends its experts.
        rows: B of its batch, at least 1.
        length: L of its batch, at least 1.
    """

    indices: tuple[int, ...]
    rows: int
    length: int


def plan_passes(
    lengths: Sequence[int], world_size: int, batch_size: int, *, same_shape: bool
) -> list[list[Pass]]:
    """Spreads prompts over ranks, and makes as many passes of it on each rank.

    The same arguments give the same passes everywhere, so no rank asks another.

    Args:
        lengths: Tokens of each prompt.
        world_size: Number of ranks.
        batch_size: Most prompts in a batch.
        same_shape: Whether all ranks need batches of one shape in a pass, as Megatron's dispatcher
            allgather does.

    Returns:
        For each rank its passes, in order.
    """
    batches_of = spread(lengths, world_size, batch_size, max_new_tokens=0)
    num_passes = max(len(batches) for batches in batches_of)
    passes_of: list[list[Pass]] = [[] for _ in range(world_size)]
    for number in range(num_passes):
        together = [
            batches[number].indices if number < len(batches) else () for batches in batches_of
        ]
        shapes = [(len(own), max((lengths[i] for i in own), default=1)) for own in together]
        rows, length = (max(sizes) for sizes in zip(*shapes, strict=True))
        for passes, own, shape in zip(passes_of, together, shapes, strict=True):
            passes.append(
                Pass(own, *((rows, length) if same_shape else (max(1, shape[0]), shape[1])))
            )
    return passes_of


def score_pass(
    model: Any, each: Pass, prompts: Sequence[EncodedPrompt], device: torch.device
) -> list[ScoreResult]:
    """Goes through the model once, and scores this rank's prompts of the pass.

    Args:
        model: The model.
        each: The pass.
        prompts: All prompts of the job.
        device: Where the model lives.

    Returns:
        A result for each of its prompts, in their order.
    """
    own = [prompts[index] for index in each.indices]
    ids_BL = torch.zeros(each.rows, each.length, dtype=torch.int64)
    for row, encoded in zip(ids_BL, own, strict=False):
        row[: len(encoded.token_ids)] = torch.tensor(encoded.token_ids)
    ids_BL = ids_BL.to(device)
    logits_BLV = megatron_logits(model, ids_BL)
    return [
        score_tokens(encoded, logits_LV[: len(encoded.token_ids)])
        for encoded, logits_LV in zip(own, logits_BLV, strict=False)
    ]


def megatron_logits(model: Any, ids_BL: Tensor) -> Tensor:
    """Returns the logits after each token, [B, L, V].

    Args:
        model: The model.
        ids_BL: Token ids, each row from position 0 on. What stands behind the end of a prompt
            changes nothing before it.
    """
    positions_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    with torch.no_grad():
        # Without a mask: attention is causal.
        return model(ids_BL, positions_BL, None)
