"""Decides which rank serves which prompts, and in which batches.

It is arithmetic on lengths: no prompt, no model and no process group is touched.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

__all__ = ["Batch", "replicate", "spread"]


@dataclass(frozen=True)
class Batch:
    """Prompts that one rank serves together, by their index in the input."""

    indices: tuple[int, ...]


def spread(
    lengths: Sequence[int],
    world_size: int,
    batch_size: int,
    *,
    max_new_tokens: int,
    new_token_cost: float = 1.0,
    takes_padding: bool = True,
) -> list[list[Batch]]:
    """Spreads prompts over ranks so that the ranks get equal work, and cuts them into batches.

    Prompts are handed out longest first, each to the rank with the least work so far (the lowest
    rank if several have it). The work of a prompt is its tokens and, at their own cost,
    `max_new_tokens`.
    Each rank serves its longest prompts first, so batches hold similar lengths and need little
    padding. The same arguments give the same result everywhere.

    The most loaded rank has at most 4/3 - 1/(3 * world_size) times the work it would have in the
    best spread possible.

    Args:
        lengths: Tokens of each prompt.
        world_size: Number of ranks.
        batch_size: Most prompts in a batch.
        max_new_tokens: Most tokens generated for a prompt; 0 for scoring.
        new_token_cost: What one of them costs, in tokens of a prompt.
        takes_padding: Whether the prompts of a batch may have different lengths.

    Returns:
        For each rank its batches, in the order to serve them; empty for a rank without prompts.

    Source:
        The rule and its bound: R. L. Graham, Bounds on Multiprocessing Timing Anomalies, SIAM
        Journal on Applied Mathematics 17 (1969), https://doi.org/10.1137/0117039.
    """
    indices_of_rank: list[list[int]] = [[] for _ in range(world_size)]
    new_tokens_work = new_token_cost * max_new_tokens
    loads = [(0.0, rank) for rank in range(world_size)]  # a heap
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + lengths[index] + new_tokens_work, rank))
        indices_of_rank[rank].append(index)
    batches_of_rank = []
    for indices in indices_of_rank:
        groups = [indices]
        if not takes_padding:
            groups = [list(group) for _, group in groupby(indices, key=lengths.__getitem__)]
        batches_of_rank.append(
            [
                Batch(tuple(group[start : start + batch_size]))
                for group in groups
                for start in range(0, len(group), batch_size)
            ]
        )
    return batches_of_rank


def replicate(
    lengths: Sequence[int], world_size: int, batch_size: int, *, takes_padding: bool = True
) -> list[list[Batch]]:
    """Gives all prompts to every rank, longest first, cut into batches.

    Args:
        lengths: Tokens of each prompt.
        world_size: Number of ranks.
        batch_size: Most prompts in a batch.
        takes_padding: Whether the prompts of a batch may have different lengths.

    Returns:
        For each rank the same batches, in the order to serve them.
    """
    own = spread(lengths, 1, batch_size, max_new_tokens=0, takes_padding=takes_padding)
    return own * world_size
