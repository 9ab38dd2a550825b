"""The all-gather dispatcher: every rank gets every row, and computes those that chose its experts.

Two collectives a layer, and shapes that depend on nothing but the numbers of tokens.
"""

# Shapes: T tokens here, H hidden, K top_k, W ranks of the expert group, R tokens of all ranks

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.moe.experts import Compute, local_ids

__all__ = ["AllGather"]


class AllGather:
    """Gathers rows and their routing in one message, and sums the ranks' shares in another.

    With the numbers of tokens known there is no device-to-host sync, so a CUDA graph can hold it.

    Args:
        comm: Collectives of the expert group.
        num_local_experts: Experts on each rank; expert i lives on rank ``i // num_local_experts``.
    """

    name = "allgather"

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
        if num_tokens_W is None:
            gathered = self.comm.gather_ints([x_TH.shape[0]], x_TH.device)
            num_tokens_W = [count for (count,) in gathered]
        rows = (x_TH, topk_ids_TK.int(), topk_weights_TK.float())
        x_RH, ids_RK, weights_RK = self.comm.gather_rows(rows, num_tokens_W, meanwhile)
        local_ids_RK = local_ids(ids_RK, self.comm.rank, self.comm.size, self.num_local_experts)
        y_RH, tokens_per_expert = compute(x_RH, local_ids_RK, weights_RK)
        return self.comm.reduce_rows(y_RH, num_tokens_W), tokens_per_expert
