"""Which rows of a forward pass are tokens that somebody wants: the others need no experts.

Prompts of a batch are padded to one length, and transformers' ``generate`` carries a prompt that
has ended along until the whole batch has. Attention masks such rows, so what experts would make of
them changes no other.
"""

# Shapes: B prompts of a batch, S tokens of each in a pass, L tokens of each so far

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

__all__ = ["LiveRows"]


class LiveRows:
    """Follows the batches of a rank.

    Args:
        end_ids: Tokens that end a completion.
        device: Device of the model.
    """

    def __init__(self, end_ids: Collection[int], device: torch.device) -> None:
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        self._mask_BS: Tensor | None = None  # until the first pass of a batch has begun
        self._ended_B: Tensor | None = None
        self._rooms_B: Tensor | None = None  # tokens that each row may still get
        self._num_completing = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_completing(self) -> int:
        """How often a pass was to give a prompt its next token; a device-to-host sync."""
        return int(self._num_completing)

    def start_batch(self, mask_BS: Tensor, rooms: Sequence[int] | None = None) -> None:
        """Says that the next pass is the first of a batch.

        Args:
            mask_BS: 1 for the tokens of its prompts, 0 for padding. A prompt that has none is none.
            rooms: New tokens after which each row ends; by default only an end token ends it.
        """
        self._rooms_B = None if rooms is None else torch.tensor(rooms, device=mask_BS.device)
        self._mask_BS = mask_BS.bool()
        self._ended_B = ~self._mask_BS.any(dim=1)

    def of_pass(self, ids_BS: Tensor) -> Tensor | None:
        """Returns which tokens of a pass are live; on a GPU no device-to-host sync.

        Args:
            ids_BS: Input tokens.

        Returns:
            bool ``[B * S]``; None if all are, as far as the host knows.
        """
        if self._ended_B is None:
            return None
        if self._mask_BS is not None:
            live_BS, self._mask_BS = self._mask_BS, None
        else:
            if len(self._end_ids):
                self._ended_B = self._ended_B | torch.isin(ids_BS[:, -1], self._end_ids)
            if self._rooms_B is not None:
                self._ended_B = self._ended_B | (self._rooms_B <= 0)
            live_BS = ~self._ended_B[:, None]
        if self._rooms_B is not None:
            self._rooms_B = self._rooms_B - 1
        self._num_completing += live_BS[:, -1].sum()
        if not live_BS.is_cuda and bool(live_BS.all()):
            return None
        return live_BS.reshape(-1)
