"""Keeps ranks that work on different batches in step, one forward pass at a time.

Every forward pass meets collectives in its MoE layers, so all ranks must start as many of them. A
rank announces each of its own passes with one small all-reduce; a rank with nothing left joins the
passes of the others with zero rows, until none is left. So no rank waits for a batch border of
another, and a finished rank computes no attention. Nothing here knows what a pass is for.
"""

# Shapes: H hidden, K top_k

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["ForwardSync"]


class ForwardSync:
    """Announces the forward passes of a model to all ranks.

    Args:
        model: The adapted model; a hook is put on it.
        layers: Its MoE layers in the order of a forward pass.
        group: All ranks of the job: with several expert groups none of them ends, and waits for
            the others, before all have nothing left. Alone in it, nothing is announced.
        top_k: K.
        dtype: Dtype of the hidden states.
        device: Device of the hidden states.
        on_progress: Called on rank 0 at each pass with the number of prompts that all ranks have
            finished so far; on a GPU this costs a sync.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertParallelMoE],
        group: dist.ProcessGroup,
        *,
        top_k: int,
        dtype: torch.dtype,
        device: torch.device,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._layers = layers
        self._group = group
        self._alone = dist.get_world_size(group) == 1
        self._device = device
        self._dtype = dtype
        self._no_ids_0K = torch.zeros((0, top_k), dtype=torch.int64, device=device)
        self._no_weights_0K = torch.zeros((0, top_k), dtype=torch.float32, device=device)
        self._on_progress = on_progress if dist.get_rank(group) == 0 else None
        self.num_finished = 0
        self.num_steps = 0
        model.register_forward_pre_hook(lambda module, args: self._start_own_pass())

    def finish(self, num_prompts: int) -> None:
        """Counts prompts this rank has finished."""
        self.num_finished += num_prompts

    @torch.no_grad()
    def join_others(self) -> None:
        """Takes part in the others' passes with zero rows until every rank has called this."""
        while self._announce(busy=False):
            self.num_steps += 1
            for layer in self._layers:
                no_rows_0H = torch.zeros(
                    (0, layer.hidden_size), dtype=self._dtype, device=self._device
                )
                layer(no_rows_0H, self._no_ids_0K, self._no_weights_0K)

    def _start_own_pass(self) -> None:
        self.num_steps += 1
        self._announce(busy=True)

    def _announce(self, *, busy: bool) -> bool:
        """Tells all ranks whether this rank runs a forward pass now; returns whether any does."""
        if self._alone:
            finished, any_busy = self.num_finished, busy
        else:
            sums = torch.tensor([int(busy), self.num_finished], device=self._device)
            dist.all_reduce(sums, group=self._group)
            # A busy rank knows, and is spared the device-to-host sync.
            any_busy = busy or bool(sums[0])
            finished = int(sums[1]) if self._on_progress else 0
        if self._on_progress:
            self._on_progress(finished)
        return any_busy
