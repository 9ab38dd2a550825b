"""Runs the experts that live on this rank over the rows that reached it.

The arithmetic of an expert is the Hugging Face module's own; this file only says which of its
parameters are one expert's, and which row meets which local expert.
"""

# Shapes: R rows received, H hidden, K top_k, e local experts, P (row, local expert) pairs

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

__all__ = ["NOT_HERE", "expert_parameters", "run_local_experts"]

# Anything else in an experts module (a norm, say) belongs to all experts.
_PER_EXPERT = re.compile(r"(gate_up_proj|up_proj|down_proj)(_bias)?$")

NOT_HERE = -1
"""The local expert id of a top-k slot whose expert lives on another rank."""


def expert_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that hold one slice per expert in dimension 0, by name."""
    return {
        name: param
        for name, param in experts.named_parameters(recurse=False)
        if _PER_EXPERT.fullmatch(name)
    }


def run_local_experts(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums, for each row, the weighted outputs of its experts on this rank.

    Args:
        experts: Module with transformers' experts contract ``(x [P, H], ids [P, 1], weights [P, 1])
            -> [P, H]`` that holds the e experts of this rank.
        x_RH: Rows.
        local_ids_RK: Local expert ids, ``NOT_HERE`` where the slot's expert lives elsewhere.
        weights_RK: Routing weights.

    Returns:
        The sums ``[R, H]`` in x's dtype, and the number of rows each local expert got, int64
        ``[e]``.
    """
    row_P, slot_P = (local_ids_RK != NOT_HERE).nonzero(as_tuple=True)
    expert_P = local_ids_RK[row_P, slot_P].long()
    tokens_per_expert_e = torch.zeros(experts.num_experts, dtype=torch.int64, device=x_RH.device)
    tokens_per_expert_e.index_add_(0, expert_P, torch.ones_like(expert_P))
    if row_P.numel() == 0:
        # No row, no kernel; the result still hangs on the inputs, so that backward's collectives
        # run on this rank too.
        return x_RH * weights_RK.sum(dim=1, keepdim=True).to(x_RH.dtype), tokens_per_expert_e
    y_PH = experts(x_RH[row_P], expert_P[:, None], weights_RK[row_P, slot_P][:, None])
    sum_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device).index_add(
        0, row_P, y_PH.float()
    )
    return sum_RH.to(x_RH.dtype), tokens_per_expert_e
