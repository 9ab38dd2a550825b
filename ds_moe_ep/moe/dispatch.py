"""The protocol that every dispatcher keeps, and the table from which one is chosen by name."""

# Shapes: T tokens here, H hidden, K top_k, W ranks of the expert group, e local experts

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist
from torch import Tensor

from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.dist.comm_stats import CommStats
from ds_moe_ep.dist.node_groups import NodeGroups
from ds_moe_ep.dist.shared_memory import SharedMemory
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.allgather import AllGather
from ds_moe_ep.moe.allreduce import AllReduce
from ds_moe_ep.moe.alltoall import AllToAll
from ds_moe_ep.moe.capacity import Capacity
from ds_moe_ep.moe.experts import Compute
from ds_moe_ep.moe.two_level import TwoLevel

__all__ = [
    "DISPATCHERS",
    "STATIC_SHAPES",
    "TWO_LEVEL",
    "Dispatcher",
    "Links",
    "make_dispatcher",
    "make_links",
]


class Dispatcher(Protocol):
    """Brings tokens to the ranks of their experts and the weighted outputs back.

    Every rank of the group calls it for every layer, with zero tokens if it has none. It keeps no
    state between calls that a result depends on.
    """

    name: str

    def __call__(
        self,
        compute: Compute,
        x_TH: Tensor,
        topk_ids_TK: Tensor,
        topk_weights_TK: Tensor,
        num_tokens_W: Sequence[int] | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Computes the MoE output of this rank's tokens.

        Args:
            compute: What the experts of this rank do with rows: takes ``x [R, H]``, local expert
                ids ``[R, K]`` (``NOT_HERE`` for those of other ranks) and weights ``[R, K]``, or x
                alone for the one expert there is, unweighted; and returns what this method returns,
                for R rows.
            x_TH: Tokens of this rank.
            topk_ids_TK: Expert ids in the group, ``NOT_HERE`` for an expert outside of it.
            topk_weights_TK: Routing weights, any floating dtype.
            num_tokens_W: T of every rank, where all ranks know it; None where none does.
            meanwhile: Other work of this rank, done once, while rows are on their way.

        Returns:
            Output ``[T, H]`` in x's dtype, and the rows each local expert computed, int64 ``[e]``.
        """
        ...


@dataclass(frozen=True)
class Links:
    """What connects the ranks of an expert group.

    Attributes:
        flat: All ranks of the group.
        across: The ranks with this rank's place on every node, and
        within: the ranks of this node; both None unless there are several nodes of several ranks.
    """

    flat: Communicator
    across: Communicator | None = None
    within: Communicator | None = None


def make_links(
    ep_group: dist.ProcessGroup | None,
    node_groups: NodeGroups | None = None,
    *,
    stats: CommStats | None = None,
    shared: SharedMemory | None = None,
) -> Links:
    """Returns the links of an expert group.

    Args:
        ep_group: The group; None is a group of one.
        node_groups: Its two levels, if it has them.
        stats: Where all collectives count.
        shared: Memory of the ranks within a node: of the whole group where that is on one.
    """
    if node_groups is None:
        return Links(Communicator(ep_group, stats, shared))
    flat = Communicator(ep_group, stats)
    return Links(
        flat,
        across=Communicator(node_groups.across, flat.stats),
        within=Communicator(node_groups.within, flat.stats, shared),
    )


def _two_level(kind: type[AllToAll] | type[AllGather]) -> Callable[[Links, int], Dispatcher]:
    def make(links: Links, num_local_experts: int) -> Dispatcher:
        if links.across is None or links.within is None:
            raise ConfigError(
                f"dispatcher={kind.name}-2level needs several hosts with several ranks each, as "
                f"many on all; the {links.flat.size} ranks of this expert group are not spread so. "
                f"Use {kind.name}."
            )
        return TwoLevel(kind, links.across, links.within, num_local_experts)

    return make


TWO_LEVEL = ("alltoall-2level", "allgather-2level")
"""The dispatchers that need `Links` with both levels."""

STATIC_SHAPES = ("allgather", "allgather-2level", "allreduce")
"""The dispatchers whose shapes follow from the tokens of each rank: a CUDA graph holds them."""

DISPATCHERS: dict[str, Callable[[Links, int], Dispatcher]] = {
    "alltoall": lambda links, num_local_experts: AllToAll(links.flat, num_local_experts),
    "allgather": lambda links, num_local_experts: AllGather(links.flat, num_local_experts),
    "allreduce": lambda links, num_local_experts: AllReduce(links.flat, num_local_experts),
    "deepspeed": lambda links, num_local_experts: Capacity(links.flat, num_local_experts),
    "alltoall-2level": _two_level(AllToAll),
    "allgather-2level": _two_level(AllGather),
}
"""What makes a dispatcher, by the name users give to ``--dispatcher``."""


def make_dispatcher(name: str, links: Links, num_local_experts: int) -> Dispatcher:
    """Returns the dispatcher called `name`.

    Raises:
        ConfigError: There is none of that name, or the ranks are not placed as it needs them.
    """
    if name not in DISPATCHERS:
        raise ConfigError(
            f"dispatcher={name!r} is unknown. Use one of: auto, {', '.join(DISPATCHERS)}."
        )
    return DISPATCHERS[name](links, num_local_experts)
