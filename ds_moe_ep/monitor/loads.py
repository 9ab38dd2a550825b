"""What routers chose: tokens per expert and layer, and how evenly ranks computed them."""

# Shapes: T tokens here, K top_k, L MoE layers, E experts, S slots (T * K)

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["ExpertLoads", "Windows"]

# Windows are merged in pairs when there are this many, so that a job of any length has enough.
_MOST_WINDOWS = 256
_FIRST_WINDOW_STEPS = 8


class ExpertLoads:
    """Counts the tokens that chose each expert.

    Args:
        num_layers: L.
        num_experts: E.
        device: Device of the model.
    """

    def __init__(self, num_layers: int, num_experts: int, device: torch.device) -> None:
        self.tokens_LE = torch.zeros((num_layers, num_experts), dtype=torch.int64, device=device)

    def count(self, topk_ids_LTK: Sequence[Tensor], live_T: Tensor | None) -> None:
        """Counts a pass, all its layers at once; no device-to-host sync.

        Args:
            topk_ids_LTK: What the router of each MoE layer chose, ``[T, K]``.
            live_T: Which tokens count; None if all do.
        """
        ids_LS = torch.stack([ids_TK.reshape(-1) for ids_TK in topk_ids_LTK]).long()
        if live_T is None:
            counted_LS = torch.ones_like(ids_LS)
        else:
            counted_TK = live_T.long()[:, None].expand(topk_ids_LTK[0].shape)
            counted_LS = counted_TK.reshape(-1).expand(ids_LS.shape)
        self.tokens_LE.scatter_add_(1, ids_LS, counted_LS)


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
