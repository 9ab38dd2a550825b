"""The all-reduce dispatcher: all ranks have the same tokens, and one collective sums the result."""

# Shapes: T tokens, the same on every rank, H hidden, K top_k, W ranks of the expert group

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.moe.experts import Compute, local_ids

__all__ = ["AllReduce"]


class AllReduce:
    """Computes on each rank what the shared tokens want of its experts, and sums over ranks.

    The sum is the same bit for bit on every rank, so ranks that decode greedily stay together.

    Args:
        comm: Collectives of the expert group.
        num_local_experts: Experts on each rank; expert i lives on rank ``i // num_local_experts``.
    """

    name = "allreduce"

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
        """See ``Dispatcher``.

        Raises:
            DistributedError: The ranks are known to have different numbers of tokens.
        """
        if num_tokens_W is not None and min(num_tokens_W) != max(num_tokens_W):
            raise DistributedError(
                "the allreduce dispatcher needs the same tokens on every rank, but the ranks of "
                f"this group have {list(num_tokens_W)}. Use --batch-mode replicated, or "
                "--dispatcher alltoall or allgather."
            )
        x_TH = self.comm.same_on_all_ranks(x_TH)
        weights_TK = self.comm.same_on_all_ranks(topk_weights_TK)
        local_ids_TK = local_ids(
            topk_ids_TK, self.comm.rank, self.comm.size, self.num_local_experts
        )
        y_TH, tokens_per_expert = compute(x_TH, local_ids_TK, weights_TK)
        return self.comm.sum_over_ranks(y_TH, meanwhile), tokens_per_expert
