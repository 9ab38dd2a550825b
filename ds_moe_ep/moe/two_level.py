"""Dispatch in two steps, between nodes and then within one, for hosts with several ranks each.

A rank meets one rank of every other node, and then the other ranks of its own: two short messages
in place of one to each rank, and a row crosses the network once for each node, not for each rank.
"""

# Shapes: T tokens here, H hidden, K top_k, N nodes, L ranks of a node, W = N * L ranks of the
# expert group, node after node

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.moe.allgather import AllGather
from ds_moe_ep.moe.alltoall import AllToAll
from ds_moe_ep.moe.experts import Compute

__all__ = ["TwoLevel"]


class TwoLevel:
    """One dispatcher between nodes, whose "experts" are another one within the node.

    Args:
        kind: The dispatcher of both steps.
        across: Collectives of the ranks with this rank's place on each node.
        within: Collectives of the ranks of this node.
        num_local_experts: Experts on each rank; expert i lives on rank ``i // num_local_experts``.
    """

    def __init__(
        self,
        kind: Callable[[Communicator, int], AllToAll | AllGather],
        across: Communicator,
        within: Communicator,
        num_local_experts: int,
    ) -> None:
        self.across = kind(across, num_local_experts * within.size)
        self.within = kind(within, num_local_experts)
        self.name = f"{self.across.name}-2level"
        self._reaches_all = isinstance(self.across, AllGather)

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
        across_N = within_L = None
        if num_tokens_W is not None:
            place, num_places = self.within.comm.rank, self.within.comm.size
            across_N = num_tokens_W[place::num_places]
            if self._reaches_all:  # else the routing decides how many rows reach a node
                within_L = [sum(num_tokens_W[each::num_places]) for each in range(num_places)]

        def compute_on_node(
            x_RH: Tensor, ids_RK: Tensor, weights_RK: Tensor
        ) -> tuple[Tensor, Tensor]:
            return self.within(compute, x_RH, ids_RK, weights_RK, within_L)

        return self.across(compute_on_node, x_TH, topk_ids_TK, topk_weights_TK, across_N, meanwhile)
