"""Which copy of an expert a token goes to, where experts have slots by a placement.

Dispatchers know slots only: they see as many "experts" as there are slots, contiguous on ranks.
"""

# Shapes: T tokens here, K top_k, E experts, C copies that an expert has at most

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ExpertSlots"]


class ExpertSlots:
    """The slots of a layer's experts. The tokens of a rank take the copies of an expert in turn.

    Args:
        expert_of_slot: The expert of each slot, rank after rank.
    """

    def __init__(self, expert_of_slot: Sequence[int]) -> None:
        slots_of: list[list[int]] = [[] for _ in range(max(expert_of_slot) + 1)]
        for slot, expert in enumerate(expert_of_slot):
            slots_of[expert].append(slot)
        most = max(len(slots) for slots in slots_of)
        self._copies_E = torch.tensor([len(slots) for slots in slots_of])
        # Padding is never chosen.
        self._slots_EC = torch.tensor([slots + [-1] * (most - len(slots)) for slots in slots_of])

    def choose(self, topk_ids_TK: Tensor, first: int) -> Tensor:
        """Returns slots in place of experts, ``[T, K]``.

        Args:
            topk_ids_TK: Expert ids.
            first: Turn of the first token. Where ranks have tokens of their own it is another on
                each, so that few tokens on many ranks do not all take the same copy.
        """
        if self._copies_E.device != topk_ids_TK.device:
            self._copies_E = self._copies_E.to(topk_ids_TK.device)
            self._slots_EC = self._slots_EC.to(topk_ids_TK.device)
        ids_TK = topk_ids_TK.long()
        end = first + len(ids_TK)
        turn_T1 = torch.arange(first, end, device=ids_TK.device)[:, None]
        return self._slots_EC[ids_TK, turn_T1 % self._copies_E[ids_TK]]
