"""What the experts of a swapped layer are called in a state dict: by DeepSpeed's names.

DeepSpeed's own experts are a list of modules, and its MoE checkpoints have a file for each of them.
Ours share one parameter with a slice for each. Only names and slices are dealt with here; files are
DeepSpeed's business, or checkpoint/deepspeed_layout.py's.
"""

# Shapes: e local experts

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ds_moe_ep.moe.experts import expert_parameters

__all__ = ["EXPERT_LIST", "PATH_OF_EXPERTS", "name_experts_as_deepspeed_does"]

PATH_OF_EXPERTS = "deepspeed_moe.experts"
"""Where a swapped layer, like DeepSpeed's own, holds its experts."""

EXPERT_LIST = "deepspeed_experts"
"""DeepSpeed's name of its list of experts; it looks for it in the names of tensors."""

_OF_ONE_EXPERT = re.compile(rf"{EXPERT_LIST}\.(\d+)\.(.+)")


def name_experts_as_deepspeed_does(experts: nn.Module) -> None:
    """Makes an experts module give and take ``deepspeed_experts.{local expert}.{name}``.

    The slices that it gives are views of the parameters. What all experts share, a norm, say, is
    given with each of them, because DeepSpeed knows no other place for it.

    Args:
        experts: Module with this rank's experts.
    """
    experts.register_state_dict_post_hook(_split)
    experts.register_load_state_dict_pre_hook(_join)


def _split(experts: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any) -> None:
    split = expert_parameters(experts)
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        value = state_dict.pop(key)
        for expert in range(experts.num_experts):
            part = value[expert] if name in split else value
            state_dict[f"{prefix}{EXPERT_LIST}.{expert}.{name}"] = part


def _join(experts: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Joins what `_split` gave, where every expert has it; else torch says what is missing."""
    split = expert_parameters(experts)
    parts_of: dict[str, dict[int, Tensor]] = defaultdict(dict)
    for key, value in state_dict.items():
        if found := _OF_ONE_EXPERT.fullmatch(key.removeprefix(prefix)):
            parts_of[found[2]][int(found[1])] = value
    for name, parts in parts_of.items():
        if parts.keys() != set(range(experts.num_experts)):
            continue
        values = [
            state_dict.pop(f"{prefix}{EXPERT_LIST}.{expert}.{name}") for expert in sorted(parts)
        ]
        state_dict[prefix + name] = torch.stack(values) if name in split else values[0]
