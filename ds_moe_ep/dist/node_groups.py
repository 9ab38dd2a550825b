"""Process groups for two-level dispatch, within each node and across nodes; a node's shared memory.

Where a node ends is the caller's knowledge, and an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

from ds_moe_ep.dist.group_timeout import same_timeout_for_new_groups
from ds_moe_ep.dist.shared_memory import SharedMemory

__all__ = [
    "NodeGroups",
    "create_node_groups",
    "first_ranks",
    "nodes_of",
    "open_within_nodes",
    "ranks_per_node",
]

# For the rows of two exchanges of all ranks of a group on a node: half of what a container has
# there if nobody asked for more.
_SHARED_BYTES = 32 * 2**20


@dataclass(frozen=True)
class NodeGroups:
    """The two groups of one rank.

    Attributes:
        across: The ranks of its expert group that have its place on their nodes, node by node.
        within: The ranks of its expert group on its node.
    """

    across: dist.ProcessGroup
    within: dist.ProcessGroup


def nodes_of(hosts: Sequence[str], local_ranks: Sequence[int]) -> list[int]:
    """Numbers the node of every rank: a node ends where the host changes or a local rank is back.

    Args:
        hosts: Name of every rank's host, by rank. Hosts may share a name.
        local_ranks: Its number on that host. DeepSpeed counts from the rank modulo the ranks there,
            so with other slots on the hosts before it need not begin at 0.
    """
    nodes: list[int] = []
    here: set[int] = set()
    for rank, (host, local_rank) in enumerate(zip(hosts, local_ranks, strict=True)):
        if rank == 0 or host != hosts[rank - 1] or local_rank in here:
            nodes.append(nodes[-1] + 1 if nodes else 0)
            here = set()
        else:
            nodes.append(nodes[-1])
        here.add(local_rank)
    return nodes


def first_ranks(nodes: Sequence[int]) -> list[int]:
    """Returns the lowest rank of each node, in order.

    Args:
        nodes: Node of every rank, as `nodes_of` numbers them.
    """
    return [rank for rank, node in enumerate(nodes) if rank == 0 or node != nodes[rank - 1]]


def ranks_per_node(ep_size: int, nodes: Sequence[int]) -> int | None:
    """Returns how many ranks of an expert group each node has, the same for all.

    Args:
        ep_size: Ranks of an expert group; groups are of consecutive ranks.
        nodes: Node of every rank.

    Returns:
        None if there are no two levels: unless every group has several nodes with as many ranks on
        each, two at least.
    """
    counts = [
        list(Counter(nodes[first : first + ep_size]).values())
        for first in range(0, len(nodes), ep_size)
    ]
    sizes = {size for of_group in counts for size in of_group}
    if len(sizes) != 1 or sizes == {1} or any(len(of_group) == 1 for of_group in counts):
        return None
    return sizes.pop()


def create_node_groups(ep_size: int, nodes: Sequence[int]) -> NodeGroups | None:
    """Makes the groups of all ranks and returns this rank's; all ranks call it.

    Args:
        ep_size: Ranks of an expert group; groups are of consecutive ranks.
        nodes: Node of every rank.

    Returns:
        None, on all ranks alike, if there are no two levels.
    """
    places = ranks_per_node(ep_size, nodes)
    if places is None:
        return None
    expert_groups = [range(first, first + ep_size) for first in range(0, len(nodes), ep_size)]
    within = [ranks[i : i + places] for ranks in expert_groups for i in range(0, ep_size, places)]
    across = [ranks[place::places] for ranks in expert_groups for place in range(places)]
    return NodeGroups(across=_own_group(across), within=_own_group(within))


def open_within_nodes(
    ep_group: dist.ProcessGroup,
    node_groups: NodeGroups | None,
    nodes: Sequence[int],
    *,
    timeout_s: float,
) -> SharedMemory | None:
    """Maps memory for this rank's part of an expert group on its node; all ranks call it.

    Args:
        ep_group: This rank's expert group.
        node_groups: Its two levels, if it has them.
        nodes: Node of every rank.
        timeout_s: How long a rank waits for another.

    Returns:
        None where a group without two levels is spread over nodes, where its tensors are not on the
        CPU, or where there is no room.
    """
    group = ep_group if node_groups is None else node_groups.within
    on_one_node = len({nodes[rank] for rank in dist.get_process_group_ranks(group)}) == 1
    if not on_one_node or dist.get_backend(group) != "gloo":
        return None
    return SharedMemory.open(group, total_bytes=_SHARED_BYTES, timeout_s=timeout_s)


def _own_group(all_ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Makes a group of each list of ranks, in the same order on every rank; returns this rank's."""
    with same_timeout_for_new_groups():
        groups = {tuple(ranks): dist.new_group(list(ranks)) for ranks in all_ranks}
    return next(group for ranks, group in groups.items() if dist.get_rank() in ranks)
