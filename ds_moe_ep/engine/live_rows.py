"""Which rows of a forward pass are tokens that somebody wants: the others need no experts.

Prompts of a batch are padded to one length, and transformers' ``generate`` carries a prompt that
has ended along until the whole batch has. Attention masks such rows, so what experts would make of
them changes no other.
"""

# Shapes: B prompts of a batch, S tokens of each in a pass, L tokens of each so far

from __future__ import annotations

from collections.abc import Collection

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
        self._ended_B: Tensor | None = None
        self._num_completing = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_completing(self) -> int:
        """How often a pass was to give a prompt its next token; a device-to-host sync."""
        return int(self._num_completing)

    def start_batch(self) -> None:
        """Says that the next pass is the first of a batch."""
        self._ended_B = None

    def of_pass(self, ids_BS: Tensor, mask_BL: Tensor | None) -> Tensor | None:
        """Returns which tokens of a pass are live; on a GPU no device-to-host sync.

        Args:
            ids_BS: Input tokens.
            mask_BL: Attention mask of these and earlier tokens, 0 for padding.

        Returns:
            bool ``[B * S]``; None if all are, as far as the host knows.
        """
        if self._ended_B is None or len(self._ended_B) != len(ids_BS):
            self._ended_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
        elif len(self._end_ids):
            self._ended_B = self._ended_B | torch.isin(ids_BS[:, -1], self._end_ids)
        live_BS = ~self._ended_B[:, None].expand(ids_BS.shape)
        if mask_BL is not None:
            live_BS = live_BS & mask_BL[:, -ids_BS.shape[1] :].bool()
        self._num_completing += live_BS[:, -1].sum()
        if not live_BS.is_cuda and bool(live_BS.all()):
            return None
        return live_BS.reshape(-1)
