"""The deepspeed dispatcher: the padded way of DeepSpeed's own MoE layer, to compare with.

What it shares with that layer is imported from there; the router, the experts and the links are
those of every other dispatcher here, so that a comparison is one of the way rows travel.
"""

# Shapes: T tokens here, H hidden, K top_k, E experts, e local experts, W ranks of the expert group,
# C capacity: rows of each expert from each rank, R rows received (W * e * C)

from __future__ import annotations

from collections.abc import Sequence

import torch
from deepspeed.moe import sharded_moe
from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.moe.experts import NOT_HERE, Compute

__all__ = ["Capacity"]


class Capacity:
    """Gives every expert as many rows from each rank as the busiest gets, the rest of them padding.

    This is ``MOELayer`` of DeepSpeed with ``drop_tokens=False``: one small collective for the
    capacity, then all-to-all with equal parts both ways. DeepSpeed takes the maximum over ranks;
    here they tell each other the counts, a message of as many steps, which also says how many rows
    of a local expert are not padding. Padding is sent and computed, as there.

    Args:
        comm: Collectives of the expert group.
        num_local_experts: Experts on each rank; expert i lives on rank ``i // num_local_experts``.

    Source: deepspeed/moe/sharded_moe.py of DeepSpeed 0.19.8.
    """

    name = "deepspeed"

    def __init__(self, comm: Communicator, num_local_experts: int) -> None:
        self.comm = comm
        self.num_local_experts = num_local_experts

    def __call__(
        self,
        compute: Compute,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        num_tokens_W: Sequence[int] | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See ``Dispatcher``."""
        size, num_local = self.comm.size, self.num_local_experts
        num_experts = size * num_local
        places_TK, counts_E = _places(topk_ids_TK, num_experts)
        (counts_WE,) = self.comm.gather_rows((counts_E[None],), [1] * size)
        capacity = int(counts_WE.max())  # a device-to-host sync on a GPU, as in DeepSpeed

        slots_KT = sharded_moe._route_slots(
            topk_ids_TK.t().contiguous(), places_TK.t().contiguous(), num_experts, capacity
        )
        x_ECH = sharded_moe._sparse_encode(x_TH, slots_KT, num_experts, capacity)
        equal = [num_local * capacity] * size
        (x_RH,) = self.comm.exchange_rows((x_ECH.flatten(0, 1),), equal, equal, meanwhile)
        rows_R1 = torch.arange(len(x_RH), device=x_TH.device)[:, None]
        local_ids_R1 = rows_R1 // max(1, capacity) % num_local
        y_RH, _ = compute(x_RH, local_ids_R1, torch.ones_like(local_ids_R1, dtype=torch.float32))
        (y_SH,) = self.comm.exchange_rows((y_RH,), equal, equal)

        weights_KT = topk_weights_TK.t().float()
        output_TH = sharded_moe._sparse_decode(y_SH, slots_KT, weights_KT, len(x_TH))
        first = self.comm.rank * num_local
        return output_TH, counts_WE[:, first : first + num_local].sum(dim=0)


def _places(topk_ids_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Numbers the rows of each expert.

    Unlike in DeepSpeed, a token may choose an expert in several slots: each is a row.

    Returns:
        How many rows of its expert are before that of a slot ``[T, K]``, and rows of each expert
        ``[E]``.
    """
    is_here_TK = topk_ids_TK != NOT_HERE
    ids_TK = topk_ids_TK.long().masked_fill(~is_here_TK, 0)
    chosen_TE = ids_TK.new_zeros((len(ids_TK), num_experts))
    chosen_TE.scatter_add_(1, ids_TK, is_here_TK.long())
    until_TE = chosen_TE.cumsum(dim=0)
    of_token_TK = (ids_TK[:, :, None] == ids_TK[:, None, :]).tril(-1).sum(dim=-1)
    return (until_TE - chosen_TE).gather(1, ids_TK) + of_token_TK, chosen_TE.sum(dim=0)
