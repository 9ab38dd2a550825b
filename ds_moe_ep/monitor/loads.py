"""What routers chose: tokens per expert and layer, and how evenly ranks computed them."""

# Shapes: T tokens here, K top_k, L MoE layers, E experts, B prompts of a batch, S tokens of each
# in a pass

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ExpertLoads", "LiveRows", "Windows"]

# Windows are merged in pairs when there are this many, so that a job of any length has enough.
_MOST_WINDOWS = 256
_FIRST_WINDOW_STEPS = 8


class LiveRows:
    """Which rows of a batch are tokens that somebody wants: not padding, not after an end token.

    transformers' ``generate`` carries a prompt that has ended along until the whole batch has.

    Args:
        end_ids: Tokens that end a completion.
        device: Device of the model.
    """

    def __init__(self, end_ids: Sequence[int], device: torch.device) -> None:
        self._end_ids = torch.tensor(sorted(end_ids), dtype=torch.int64, device=device)
        self._ended_B: Tensor | None = None
        self.num_completing = torch.zeros((), dtype=torch.int64, device=device)

    def of_pass(self, ids_BS: Tensor, mask_BL: Tensor | None, *, is_first: bool) -> Tensor:
        """Returns which tokens of a pass are live; no device-to-host sync.

        Args:
            ids_BS: Input tokens.
            mask_BL: Attention mask of these and earlier tokens, 0 for padding.
            is_first: Whether the batch begins with this pass.

        Returns:
            int64 ``[B * S]``, 1 or 0. Each prompt with a live last token gets a new token by this
            pass; `num_completing` counts them.
        """
        if is_first or self._ended_B is None:
            self._ended_B = torch.zeros(len(ids_BS), dtype=torch.bool, device=ids_BS.device)
        elif len(self._end_ids):
            self._ended_B = self._ended_B | torch.isin(ids_BS[:, -1], self._end_ids)
        live_BS = (~self._ended_B).to(torch.int64)[:, None].expand(ids_BS.shape)
        if mask_BL is not None and mask_BL.dim() == 2:
            live_BS = live_BS * mask_BL[:, -ids_BS.shape[1] :].to(torch.int64)
        self.num_completing += live_BS[:, -1].sum()
        return live_BS.reshape(-1)


class ExpertLoads:
    """Counts the tokens that chose each expert.

    Args:
        num_layers: L.
        num_experts: E.
        device: Device of the model.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.tokens_LE = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)

    def count(self, layer: int, topk_ids_TK: Tensor, live_T: Tensor) -> None:
        """Counts the choices of live tokens in a layer; no device-to-host sync."""
        counted_TK = live_T[:, None].expand(topk_ids_TK.shape)
        ids = topk_ids_TK.reshape(-1).long()
        self.tokens_LE[layer].scatter_add_(0, ids, counted_TK.reshape(-1))


@dataclass
class Windows:
    """Rows that this rank computed in each MoE layer, by windows of passes.

    Every rank starts the same passes, so the windows of all ranks are the same.

    Attributes:
        rows: A list for each window that is full, with a number for each layer.
        num_steps: Passes of a window.
    """

    rows: list[list[int]] = field(default_factory=list)
    num_steps: int = _FIRST_WINDOW_STEPS
    _before: list[int] | None = None

    def is_full_at(self, step: int) -> bool:
        """Tells whether a window has ended as pass number `step` begins, the first being 1."""
        return step > 1 and (step - 1) % self.num_steps == 0

    def close(self, rows_so_far: Sequence[int]) -> None:
        """Ends a window.

        Args:
            rows_so_far: What this rank has computed in each layer since the job began.
        """
        before = self._before or [0] * len(rows_so_far)
        self.rows.append([now - then for now, then in zip(rows_so_far, before, strict=True)])
        self._before = list(rows_so_far)
        if len(self.rows) == _MOST_WINDOWS:
            pairs = zip(self.rows[::2], self.rows[1::2], strict=True)
            self.rows = [[a + b for a, b in zip(*pair, strict=True)] for pair in pairs]
            self.num_steps *= 2
