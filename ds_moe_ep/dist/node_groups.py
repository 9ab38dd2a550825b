"""Process groups for two-level dispatch: within each node, and across nodes.

Where a node ends is the caller's knowledge, and an argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist

__all__ = ["NodeGroups", "create_node_groups", "nodes_of"]


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
    """Numbers the node of every rank: a node ends where the host changes or local ranks restart.

    Args:
        hosts: Name of every rank's host, by rank. Hosts may share a name.
        local_ranks: Its number on that host.
    """
    nodes = [0]
    for rank in range(1, len(hosts)):
        is_new = hosts[rank] != hosts[rank - 1] or local_ranks[rank] <= local_ranks[rank - 1]
        nodes.append(nodes[-1] + is_new)
    return nodes


def create_node_groups(ep_size: int, nodes: Sequence[int]) -> NodeGroups | None:
    """Makes the groups of all ranks and returns this rank's; all ranks call it.

    Args:
        ep_size: Ranks of an expert group; groups are of consecutive ranks.
        nodes: Node of every rank.

    Returns:
        None, on all ranks alike, unless each expert group has several nodes with as many ranks on
        each, two at least.
    """
    expert_groups = [list(range(first, first + ep_size)) for first in range(0, len(nodes), ep_size)]
    places, *others = {_places([nodes[rank] for rank in ranks]) for ranks in expert_groups}
    if others or places == 0:
        return None
    within = [ranks[i : i + places] for ranks in expert_groups for i in range(0, ep_size, places)]
    across = [ranks[place::places] for ranks in expert_groups for place in range(places)]
    return NodeGroups(across=_own_group(across), within=_own_group(within))


def _places(nodes: Sequence[int]) -> int:
    """Returns how many ranks of an expert group each node has, 0 where two levels do not apply."""
    counts = Counter(nodes)
    places, *others = set(counts.values())
    return 0 if others or places == 1 or len(counts) == 1 else places


def _own_group(all_ranks: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """Makes a group of each list of ranks, in the same order on every rank; returns this rank's."""
    groups = {tuple(ranks): dist.new_group(list(ranks)) for ranks in all_ranks}
    return next(group for ranks, group in groups.items() if dist.get_rank() in ranks)
