"""Watches the forward passes of a rank: how long which part took, and the rows of its experts.

It puts hooks on the model and takes them off again; what is made of the figures is not its
business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.moe.layer import ExpertParallelMoE
from ds_moe_ep.monitor.pass_clock import PassClock
from ds_moe_ep.monitor.windows import Borders

__all__ = ["Recorder"]

# What transformers' models call what mixes the tokens of a sequence, and what chooses experts.
_MIXERS = (
    *("self_attn", "attention", "attn", "self_attention", "linear_attn"),
    *("mamba", "mixer", "conv", "temporal_block"),
)
_ROUTERS = ("gate", "router")


class Recorder:
    """Records the passes of one model until it is closed.

    Args:
        model: The adapted model.
        layers: Its MoE layers in the order of a forward pass.
        device: Device of the model.
        splits_decode: See `PassClock`.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertParallelMoE],
        *,
        device: torch.device,
        splits_decode: bool = True,
    ) -> None:
        self.clock = PassClock(device, splits_decode=splits_decode)
        self.borders = Borders(len(layers))
        self.first_token_s = Durations()
        self._layers = layers
        self._step = 0
        self._batch_begun_s: float | None = None
        self._of_pass = [
            model.register_forward_pre_hook(self._start_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass),
        ]
        # Modules that are a part of a pass, and what says so. Their hooks are there in passes that
        # are split only: one that does nothing would cost as much as one that looks at the clock.
        self._parts = [
            (module, self._entering(part))
            for name, module in model.named_modules()
            if (part := _part_of(name, model))
        ]
        self._of_parts: list[Any] = []

    def start_batch(self) -> None:
        """Says that the next pass is the first of a batch."""
        self._batch_begun_s = time.perf_counter()

    def start_step(self, step: int) -> None:
        """Is told of every pass that this rank takes part in, from 1 on."""
        if self.borders.is_next(self._step):
            self._add_border()
        self._step = step

    def collectives(self) -> tuple[int, float]:
        """Returns how many collectives have ended, and their seconds; another thread may ask."""
        so_far = [layer.deepspeed_moe.stats.so_far() for layer in self._layers]
        return sum(count for count, _ in so_far), sum(seconds for _, seconds in so_far)

    def close(self) -> None:
        """Takes the hooks off, and counts what is not counted yet."""
        self._add_border()
        self.clock.finish()
        self._stop_splitting()
        for hook in self._of_pass:
            hook.remove()

    def _start_pass(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.clock.start("decode" if self._batch_begun_s is None else "prefill"):
            self._split()

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock.stop()
        self._stop_splitting()
        if self._batch_begun_s is not None:
            if output.logits.is_cuda:
                torch.cuda.synchronize()  # once a batch: a token is there when it can be read
            self.first_token_s.add(time.perf_counter() - self._batch_begun_s)
            self._batch_begun_s = None

    def _split(self) -> None:
        for module, enter in self._parts:
            self._of_parts.append(module.register_forward_pre_hook(enter))
            self._of_parts.append(module.register_forward_hook(self._leave))
        for layer in self._layers:
            layer.deepspeed_moe.on_part = self.clock.enter

    def _stop_splitting(self) -> None:
        for hook in self._of_parts:
            hook.remove()
        self._of_parts.clear()
        for layer in self._layers:
            layer.deepspeed_moe.on_part = None

    def _entering(self, part: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: self.clock.enter(part)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock.enter("other")

    def _add_border(self) -> None:
        rows = [layer.deepspeed_moe.tokens_per_expert.sum() for layer in self._layers]
        self.borders.add(self._step, torch.stack(rows).tolist())  # a device-to-host sync on a GPU


def _part_of(name: str, model: nn.Module) -> str | None:
    """Returns the part that a module is, by its name and its place; None if it is none."""
    parent_name, _, last = name.rpartition(".")
    if isinstance(model.get_submodule(name), ExpertParallelMoE):
        return "dispatch"  # and what its experts tell
    if last in _MIXERS:
        return None if set(parent_name.split(".")) & set(_MIXERS) else "attention"
    if last in _ROUTERS:
        siblings = model.get_submodule(parent_name).children()
        return "router" if any(isinstance(each, ExpertParallelMoE) for each in siblings) else None
    return None
