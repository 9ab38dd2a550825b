"""Computes a block's shared expert while routed rows are on their way to other ranks.

Most families that have one call it after the experts, with the block's own input: DeepSeek-V3 and
its many relatives, GLM-4, Kimi. There it can be computed sooner. Others, as Qwen2-MoE, call it
before the router, so its output is there before a row leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.dist.collectives import Meanwhile

__all__ = ["EarlySharedExpert"]


@dataclass(frozen=True)
class _Seen:
    """A tensor as it was when it was seen."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Seen:
        return cls(tensor, _version(tensor))

    def is_still(self, other: Any) -> bool:
        """Whether it is this very tensor, and nothing was written into it since."""
        return other is self.tensor and _version(other) == self.version


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # PyTorch counts what writes into it


class EarlySharedExpert:
    """Answers a block's call of its shared expert with what was computed while rows travelled.

    Nothing is known of the family. It watches one pass: where the block calls its shared expert
    after the experts, with the very tensor that the block or the experts were called with, the next
    pass computes it early from that tensor. A call with anything else is computed as ever, and
    watched anew. So the same operations run on the same tensors; only the order changes. In a pass
    that is compiled, the order is the compiler's.

    Args:
        block: The module that calls both. It gets a hook; its parameters keep their names.
        shared_expert: The shared expert. Its ``forward`` is replaced on this instance.
    """

    def __init__(self, block: nn.Module, shared_expert: nn.Module) -> None:
        self._shared_expert = shared_expert
        self._compute = shared_expert.forward
        # The inputs seen in this pass: the block's, and once they were called, the experts'.
        self._inputs: list[_Seen] = []
        self._which: int | None = None  # of these is what the shared expert is called with
        self._early: tuple[_Seen, Any] | None = None  # its input and its output
        shared_expert.forward = self._answer
        block.register_forward_pre_hook(self._begin)
        block.register_forward_hook(self._end)

    def while_rows_travel(self, x: Tensor) -> Meanwhile | None:
        """Tells what the experts, called with `x`, can do while rows travel, if anything."""
        if not self._inputs:  # the shared expert was called already
            return None
        self._inputs.append(_Seen.of(x))
        if self._which is None or self._is_watched():
            return None
        return self._compute_early

    def _compute_early(self) -> None:
        seen = self._inputs[self._which or 0]
        self._early = seen, self._compute(seen.tensor)

    def _is_watched(self) -> bool:
        """Whether somebody's hooks expect a call just when the block makes it."""
        module = self._shared_expert
        return bool(module._forward_pre_hooks or module._forward_hooks)

    def _begin(self, block: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._inputs = [_Seen.of(x) for x in args[:1] if isinstance(x, Tensor)]
            self._early = None

    def _end(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._inputs, self._early = [], None

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        """Stands in for the shared expert's ``forward``."""
        if torch.compiler.is_compiling():
            return self._compute(*args, **kwargs)
        inputs, early = self._inputs, self._early
        self._inputs, self._early = [], None
        is_plain = len(args) == 1 and not kwargs
        if early is not None and is_plain and early[0].is_still(args[0]):
            return early[1]
        self._which = None
        if is_plain and len(inputs) == 2:  # after the experts
            same = [index for index, seen in enumerate(inputs) if seen.is_still(args[0])]
            self._which = same[0] if same else None
        return self._compute(*args, **kwargs)
