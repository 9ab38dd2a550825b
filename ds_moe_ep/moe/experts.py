"""Runs the experts that live on this rank over the rows that reached it.

Which row meets which local expert is settled here; what an expert computes is in expert_gemm.py,
or the Hugging Face module's own affair where that does not follow transformers' experts contract.
"""

# Shapes: R rows received, H hidden, K top_k, e local experts, S slots (R * K), P (row, local
# expert) pairs

from __future__ import annotations

import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from ds_moe_ep.moe.expert_gemm import (
    follows_contract,
    groups_without_sync,
    run_grouped,
    run_single,
)

__all__ = [
    "NOT_HERE",
    "Compute",
    "expert_parameters",
    "local_ids",
    "run_local_experts",
    "run_static",
]

Compute = Callable[..., tuple[Tensor, Tensor]]
"""What a dispatcher brings rows to: some experts' ``run_local_experts``, or another dispatcher."""

# Anything else in an experts module (a norm, say) belongs to all experts.
_PER_EXPERT = re.compile(r"(gate_up_proj|up_proj|down_proj)(_bias)?$")

NOT_HERE = -1
"""The local expert id of a top-k slot whose expert lives on another rank."""

# Up to this many rows, a GPU multiplies all of them with a rank's one expert in about the time that
# reading the expert's weights takes, so picking out the rows that chose it would cost more.
_DENSE_ROWS = 512


def expert_parameters(experts: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters that hold one slice per expert in dimension 0, by name."""
    return {
        name: param
        for name, param in experts.named_parameters(recurse=False)
        if _PER_EXPERT.fullmatch(name)
    }


def local_ids(ids_RK: Tensor, rank: int | Tensor, num_ranks: int, num_local_experts: int) -> Tensor:
    """Returns the expert ids as `rank` counts them, ``NOT_HERE`` for the experts of other ranks.

    The rank may be one for each row ``[R, 1]``.
    """
    if num_ranks == 1:
        return ids_RK
    ids_RK = ids_RK - rank * num_local_experts
    return ids_RK.masked_fill((ids_RK < 0) | (ids_RK >= num_local_experts), NOT_HERE)


def run_local_experts(
    experts: nn.Module,
    x_RH: Tensor,
    local_ids_RK: Tensor | None = None,
    weights_RK: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Sums, for each row, the weighted outputs of its experts on this rank.

    On a GPU, experts that follow the contract run with shapes that depend on R and K alone, and
    where a CUDA graph is captured without a device-to-host sync.

    Args:
        experts: Module with transformers' experts contract ``(x [P, H], ids [P, 1], weights [P, 1])
            -> [P, H]`` that holds the e experts of this rank.
        x_RH: Rows.
        local_ids_RK: Local expert ids, ``NOT_HERE`` where the slot's expert lives elsewhere.
        weights_RK: Routing weights. Without ids and weights, all rows are for the one expert there
            is, and it is not weighted.

    Returns:
        The sums ``[R, H]`` in x's dtype, and the number of rows each local expert got, int64
        ``[e]``.
    """
    if local_ids_RK is None or weights_RK is None:
        return _run_bare_rows(experts, x_RH)
    if not follows_contract(experts):
        return _run_module(experts, x_RH, local_ids_RK, weights_RK)
    if x_RH.is_cuda:
        return run_static(experts, x_RH, local_ids_RK, weights_RK)
    if experts.num_experts == 1:
        return _run_one_expert(experts, x_RH, local_ids_RK, weights_RK)
    return _run_chosen(experts, x_RH, local_ids_RK, weights_RK)


def _run_bare_rows(experts: nn.Module, x_RH: Tensor) -> tuple[Tensor, Tensor]:
    rows_e = torch.full((1,), x_RH.shape[0], dtype=torch.int64, device=x_RH.device)
    if follows_contract(experts):
        return run_single(experts, x_RH).to(x_RH.dtype), rows_e
    ids_R1 = torch.zeros((x_RH.shape[0], 1), dtype=torch.int64, device=x_RH.device)
    y_RH, _ = _run_module(experts, x_RH, ids_R1, torch.ones_like(ids_R1, dtype=torch.float32))
    return y_RH, rows_e


def _weigh(y_PH: Tensor, weights_P1: Tensor, dtype: torch.dtype) -> Tensor:
    """Multiplies rows by float32 weights; without gradients in one pass over them, in place."""
    weighted_PH = y_PH * weights_P1 if torch.is_grad_enabled() else y_PH.mul_(weights_P1)
    return weighted_PH.to(dtype)


def _run_one_expert(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """One expert needs no sorting: one pair of matrix products over the rows that chose it."""
    here_R1, weight_R1, rows_e = _choices(local_ids_RK, weights_RK)
    row_P = here_R1.squeeze(1).nonzero().squeeze(1)
    if row_P.numel() == x_RH.shape[0] > 0:
        return _weigh(run_single(experts, x_RH), weight_R1, x_RH.dtype), rows_e
    x_PH = x_RH.index_select(0, row_P)
    y_PH = run_single(experts, x_PH) if row_P.numel() else x_PH
    y_PH = _weigh(y_PH, weight_R1[row_P], x_RH.dtype)
    return torch.zeros_like(x_RH).index_copy(0, row_P, y_PH), rows_e


def _choices(
    local_ids_RK: Tensor, weights_RK: Tensor, expert: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Merges each row's choices of an expert, by default of a rank's only one.

    Returns:
        Whether a row chose it, bool ``[R, 1]``; its weight ``[R, 1]``, the sum of all its slots';
        and the slots that chose it, int64 ``[1]``.
    """
    here_RK = local_ids_RK == expert
    weight_R1 = weights_RK.masked_fill(~here_RK, 0.0).sum(dim=1, keepdim=True)
    return here_RK.any(dim=1, keepdim=True), weight_R1, here_RK.sum().reshape(1)


def _run_chosen(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """Gathers the chosen (row, expert) pairs, expert after expert, and computes just those."""
    ids_S = local_ids_RK.flatten()
    chosen_P = (ids_S != NOT_HERE).nonzero().squeeze(1)
    expert_P, order_P = ids_S[chosen_P].sort()
    rows_e = expert_P.bincount(minlength=experts.num_experts)
    offsets_e = rows_e.cumsum(0, dtype=torch.int32)
    x_PH = x_RH.index_select(0, chosen_P[order_P] // local_ids_RK.shape[1])
    # No pair, no kernel; the result still hangs on the inputs, so that backward's collectives run
    # on this rank too.
    y_PH = run_grouped(experts, x_PH, expert_P, offsets_e) if expert_P.numel() else x_PH
    sum_RH = _weighted_sums(y_PH, chosen_P, order_P, weights_RK)
    return sum_RH.to(x_RH.dtype), rows_e


def _weighted_sums(y_PH: Tensor, chosen_P: Tensor, order_P: Tensor, weights_RK: Tensor) -> Tensor:
    """Sums the outputs of each row's pairs, in one pass over them, in float32.

    Args:
        y_PH: Outputs, expert after expert.
        chosen_P: The slot of each pair, ascending, and so row after row.
        order_P: Which of these each output is of.
        weights_RK: Routing weights of all slots.
    """
    num_rows, top_k = weights_RK.shape
    place_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(order_P.numel()))
    first_R = torch.searchsorted(chosen_P, torch.arange(0, num_rows * top_k, top_k))
    weights_P = weights_RK.flatten().index_select(0, chosen_P).float()
    return functional.embedding_bag(
        place_P, y_PH.float(), first_R, mode="sum", per_sample_weights=weights_P
    )


def run_static(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """Runs the experts as a GPU does: in shapes that depend on R and K alone.

    All slots are gathered, those of other ranks sorted behind the last expert, where nothing is
    read. With one expert a row has one slot, and where rows are few all of them are multiplied. So
    are they with every expert where a CUDA graph is captured and the GPU's grouped product syncs.

    Args and result are those of ``run_local_experts``.
    """
    if _must_not_group(experts, x_RH):
        return _run_all_rows(experts, x_RH, local_ids_RK, weights_RK)
    if experts.num_experts > 1:
        return _run_all_slots(experts, x_RH, local_ids_RK, weights_RK)
    if x_RH.shape[0] <= _DENSE_ROWS:
        return _run_dense(experts, 0, x_RH, local_ids_RK, weights_RK, dtype=x_RH.dtype)
    here_R1, weight_R1, rows_e = _choices(local_ids_RK, weights_RK)
    ids_R1 = torch.zeros_like(here_R1, dtype=local_ids_RK.dtype).masked_fill(~here_R1, NOT_HERE)
    y_RH, _ = _run_all_slots(experts, x_RH, ids_R1, weight_R1)
    return y_RH, rows_e


def _must_not_group(experts: nn.Module, x_RH: Tensor) -> bool:
    if not x_RH.is_cuda or torch.compiler.is_compiling():
        return False
    return torch.cuda.is_current_stream_capturing() and not groups_without_sync(experts)


def _run_all_rows(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """Multiplies all rows with every expert."""
    sum_RH, counts = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device), []
    for expert in range(experts.num_experts):
        y_RH, rows_1 = _run_dense(
            experts, expert, x_RH, local_ids_RK, weights_RK, dtype=torch.float32
        )
        sum_RH = sum_RH + y_RH
        counts.append(rows_1)
    return sum_RH.to(x_RH.dtype), torch.cat(counts)


def _run_dense(
    experts: nn.Module,
    expert: int,
    x_RH: Tensor,
    local_ids_RK: Tensor,
    weights_RK: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Multiplies all rows with one expert, and keeps those that chose it."""
    here_R1, weight_R1, rows_1 = _choices(local_ids_RK, weights_RK, expert)
    y_RH = _weigh(run_single(experts, x_RH, expert).to(dtype), weight_R1, dtype)
    return y_RH.masked_fill(~here_R1, 0.0), rows_1


def _run_all_slots(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    num_rows, top_k = local_ids_RK.shape
    num_experts = experts.num_experts
    if num_rows == 0:
        nothing_RH = (x_RH * weights_RK.sum(dim=1, keepdim=True)).to(x_RH.dtype)
        return nothing_RH, torch.zeros(num_experts, dtype=torch.int64, device=x_RH.device)
    # NOT_HERE, which is -1, becomes one more expert behind the last.
    expert_S, slot_S = (local_ids_RK.flatten() % (num_experts + 1)).sort()
    experts_e = torch.arange(num_experts, dtype=expert_S.dtype, device=expert_S.device)
    offsets_e = torch.searchsorted(expert_S, experts_e, right=True, out_int32=True)
    elsewhere_S1 = (expert_S == num_experts)[:, None]
    y_SH = run_grouped(
        experts, x_RH.index_select(0, slot_S // top_k), expert_S, offsets_e, elsewhere_S1
    )
    # Back in the order of slots and summed there: unlike index_add on a GPU, always in one order.
    in_order_SH = torch.empty_like(y_SH).index_copy(0, slot_S, y_SH)
    weighted_RKH = in_order_SH.view(num_rows, top_k, -1) * weights_RK[:, :, None]
    sum_RH = weighted_RKH.sum(dim=1, dtype=torch.float32)
    rows_e = offsets_e.long()
    rows_e[1:] -= offsets_e[:-1]
    return sum_RH.to(x_RH.dtype), rows_e


def _run_module(
    experts: nn.Module, x_RH: Tensor, local_ids_RK: Tensor, weights_RK: Tensor
) -> tuple[Tensor, Tensor]:
    """Calls the module itself, once, with each chosen pair as a row of its own."""
    row_P, slot_P = (local_ids_RK != NOT_HERE).nonzero(as_tuple=True)  # a sync on a GPU
    expert_P = local_ids_RK[row_P, slot_P].long()
    rows_e = torch.zeros(experts.num_experts, dtype=torch.int64, device=x_RH.device)
    rows_e.index_add_(0, expert_P, torch.ones_like(expert_P))
    x_PH, weight_P1 = x_RH[row_P], weights_RK[row_P, slot_P][:, None]
    y_PH = experts(x_PH, expert_P[:, None], weight_P1) if row_P.numel() else x_PH * weight_P1
    sum_RH = torch.zeros(x_RH.shape, dtype=torch.float32, device=x_RH.device)
    return sum_RH.index_add(0, row_P, y_PH.float()).to(x_RH.dtype), rows_e
