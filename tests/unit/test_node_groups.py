"""Where nodes end, and which expert groups have two levels (the groups work: tests/dist)."""

import pytest

from ds_moe_ep.dist.node_groups import first_ranks, nodes_of, ranks_per_node


@pytest.mark.parametrize(
    ("hosts", "local_ranks", "nodes"),
    [
        ("a", [0], [0]),
        ("aabb", [0, 1, 0, 1], [0, 0, 1, 1]),
        ("aaaa", [0, 1, 0, 1], [0, 0, 1, 1]),  # containers that share a name
        ("aabb", [0, 1, 2, 3], [0, 0, 1, 1]),
        ("abc", [0, 0, 0], [0, 1, 2]),
        ("aaabbbb", [0, 1, 2, 3, 0, 1, 2], [0, 0, 0, 1, 1, 1, 1]),  # DeepSpeed, uneven slots
        ("aaa", [0, 2, 5], [0, 0, 0]),  # slots that a hostfile left out
    ],
)
def test_a_node_ends_where_the_host_changes_or_a_local_rank_is_back(hosts, local_ranks, nodes):
    assert nodes_of(hosts, local_ranks) == nodes


@pytest.mark.parametrize(
    ("ep_size", "nodes", "expected"),
    [
        (4, [0, 0, 1, 1], 2),
        (6, [0, 0, 0, 1, 1, 1], 3),
        (4, [0, 0, 1, 1, 2, 2, 3, 3], 2),  # two expert groups
        (8, [0, 0, 1, 1, 2, 2, 3, 3], 2),
        (2, [0, 0, 1, 1], None),  # each group on one node
        (4, [0, 0, 0, 0], None),
        (4, [0, 1, 2, 3], None),  # one rank a node
        (4, [0, 0, 0, 1], None),
        (3, [0, 0, 1, 1, 2, 2], None),  # nodes cut by groups
        (1, [0], None),
    ],
)
def test_two_levels_need_several_nodes_with_as_many_ranks_on_each(ep_size, nodes, expected):
    assert ranks_per_node(ep_size, nodes) == expected


def test_the_first_ranks_of_nodes_of_uneven_sizes():
    assert first_ranks([0, 0, 0, 1, 2, 2]) == [0, 3, 4]
    assert first_ranks([0]) == [0]
