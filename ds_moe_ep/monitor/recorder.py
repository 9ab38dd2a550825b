"""Watches the forward passes of a rank: how long which part took, and what the routers chose.

It puts hooks on the model and takes them off again; what is made of the figures is not its
business.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.moe.layer import ExpertParallelMoE
from ds_moe_ep.monitor.loads import ExpertLoads, Windows
from ds_moe_ep.monitor.pass_clock import PassClock

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
        counts_tokens: Whether the tokens of this rank are its own: of a replicated batch only one
            rank counts them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[ExpertParallelMoE],
        *,
        device: torch.device,
        counts_tokens: bool = True,
    ) -> None:
        self.clock = PassClock(device)
        self.windows = Windows()
        self.first_token_s = Durations()
        self.loads = ExpertLoads(len(layers), max(each.num_experts for each in layers), device)
        self._layers = layers
        self._counts_tokens = counts_tokens
        self._topk_ids: dict[int, Tensor] = {}  # of the pass, by number of the layer
        self._batch_begun_s: float | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._start_pass, with_kwargs=True),
            model.register_forward_hook(self._end_pass),
        ]
        for number, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._count, number)))
            layer.deepspeed_moe.on_part = self.clock.enter
        for name, module in model.named_modules():
            if part := _part_of(name, model):
                self._hooks.append(module.register_forward_pre_hook(partial(self._enter, part)))
                self._hooks.append(module.register_forward_hook(self._leave))

    def start_batch(self) -> None:
        """Says that the next pass is the first of a batch."""
        self._batch_begun_s = time.perf_counter()

    def start_step(self, step: int) -> None:
        """Is told of every pass that this rank takes part in, from 1 on."""
        if self.windows.is_full_at(step):
            self._close_window()

    def close(self) -> None:
        """Takes the hooks off, and counts what is not counted yet."""
        self._close_window()
        self.clock.finish()
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            layer.deepspeed_moe.on_part = None

    def _start_pass(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self.clock.start("decode" if self._batch_begun_s is None else "prefill")

    def _end_pass(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._counts_tokens:
            ids = [self._topk_ids[number] for number in range(len(self._layers))]
            self.loads.count(ids, self._layers[0].deepspeed_moe.live_T)
        self.clock.stop()
        if self._batch_begun_s is not None:
            if output.logits.is_cuda:
                torch.cuda.synchronize()  # once a batch: a token is there when it can be read
            self.first_token_s.add(time.perf_counter() - self._batch_begun_s)
            self._batch_begun_s = None

    def _count(self, number: int, module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
        self._topk_ids[number] = args[1]

    def _enter(self, part: str, module: nn.Module, args: Any) -> None:
        self.clock.enter(part)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.clock.enter("other")

    def _close_window(self) -> None:
        rows = [layer.deepspeed_moe.tokens_per_expert.sum() for layer in self._layers]
        self.windows.close(torch.stack(rows).tolist())  # a device-to-host sync on a GPU


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
