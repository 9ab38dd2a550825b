"""Placements for recorded loads: near the best there is, never worse than what was, and as told."""

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.balance import (
    RankLayout,
    balance,
    balancedness,
    contiguous_slots,
    count_copies,
    rank_loads,
)
from ds_moe_ep.errors import PlanError
from ds_moe_ep.packing import pack


def _place(loads, *sizes):
    return balance({0: loads}, RankLayout(*sizes)).expert_of_slot[0]


def _per_rank(slots, num_ranks):
    size = len(slots) // num_ranks
    return [slots[rank * size : (rank + 1) * size] for rank in range(num_ranks)]


def _least_possible(loads, num_ranks, slots_per_rank):
    """Tries every way to give ranks different experts, each expert at least one slot."""
    held = itertools.combinations(range(len(loads)), slots_per_rank)
    best = float("inf")
    for ranks in itertools.combinations_with_replacement(list(held), num_ranks):
        copies = Counter(itertools.chain(*ranks))
        if len(copies) == len(loads):
            most = max(sum(loads[e] / copies[e] for e in rank) for rank in ranks)
            best = min(best, most)
    return best


# Ranks, slots and experts, and how far from the best a placement may be at most: without spare
# slots or with one it is close, where few experts must share few of them it is farther.
@pytest.mark.parametrize(
    ("num_ranks", "slots", "num_experts", "bound"),
    [
        (2, 2, 3, 1.01),
        (2, 3, 6, 1.01),
        (3, 2, 6, 1.01),
        (2, 3, 5, 1.10),
        (3, 3, 6, 1.15),
        (4, 2, 6, 1.15),
        (3, 2, 5, 1.20),
        (4, 2, 5, 1.20),
        (3, 2, 4, 1.25),
    ],
)
def test_the_busiest_rank_has_little_more_than_it_must(num_ranks, slots, num_experts, bound):
    chance = random.Random(1)
    for _ in range(25):
        skew = chance.uniform(0, 2)
        loads = [1000 * (i + 1) ** -skew for i in range(num_experts)]
        chance.shuffle(loads)
        placed = _place(loads, num_ranks, slots)
        most = max(rank_loads(loads, placed, num_ranks))
        least = _least_possible(loads, num_ranks, slots)
        assert least * (1 - 1e-9) <= most <= bound * least, loads


def test_a_small_placement_by_hand():
    # The expert of half the load gets both spare slots: 2 + 1 + 1, 2 + 1 + 1, 2 + 2 (+ 0).
    loads = [6, 2, 1, 1, 1, 1, 0]
    assert count_copies(loads, 9, most=3) == [3, 1, 1, 1, 1, 1, 1]
    placed = _place(loads, 3, 3)
    assert rank_loads(loads, placed, 3) == pytest.approx([4, 4, 4])
    assert all(0 in rank for rank in _per_rank(placed, 3))


def test_copies_end_where_every_rank_has_one():
    assert count_copies([100, 1, 1], 5, most=2) == [2, 2, 1]
    assert count_copies([100, 3, 1], 5, most=3, num_hot=1) == [2, 1, 2]


@st.composite
def _cases(draw):
    num_ranks = draw(st.sampled_from([1, 2, 3, 4, 6, 8]))
    num_experts = num_ranks * draw(st.integers(1, 5))
    least = num_experts // num_ranks
    slots = draw(st.integers(least, min(num_experts, least + 3)))
    num_hosts = draw(st.sampled_from([n for n in (1, 2, 3) if num_ranks % n == 0]))
    num_groups = draw(st.sampled_from([n for n in (1, 2, 4) if num_experts % n == 0]))
    load = st.integers(0, 10**6)
    loads = st.lists(load, min_size=num_experts, max_size=num_experts)
    layers = draw(st.lists(loads, min_size=1, max_size=3))
    return dict(enumerate(layers)), RankLayout(num_ranks, slots, num_hosts, num_groups)


@settings(max_examples=300, deadline=None)
@given(_cases())
def test_every_placement_is_whole_and_no_worse_than_contiguous(case):
    loads_of_layer, layout = case
    placement = balance(loads_of_layer, layout)
    assert placement == balance(loads_of_layer, layout)
    assert placement.moe_layers == tuple(loads_of_layer)
    for layer, loads in loads_of_layer.items():
        slots = placement.expert_of_slot[layer]
        assert len(slots) == layout.num_slots
        assert set(slots) == set(range(len(loads)))
        of_rank = rank_loads(loads, slots, layout.num_ranks)
        assert sum(of_rank) == pytest.approx(sum(loads))
        plain = contiguous_slots(len(loads), layout.num_ranks)
        before = rank_loads(loads, plain, layout.num_ranks)
        assert max(of_rank) <= max(before) * (1 + 1e-9)
        held = [Counter(rank) for rank in _per_rank(slots, layout.num_ranks)]
        own = {frozenset(rank) for rank in _per_rank(plain, layout.num_ranks)}
        if {frozenset(rank) for rank in held} != own:  # contiguous was not the best
            assert all(count == 1 for rank in held for count in rank.values())


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.data())
def test_packing_fills_bins_without_the_same_item_twice(num_bins, capacity, data):
    items, number = [], 0
    while len(items) < num_bins * capacity:
        room = num_bins * capacity - len(items)
        copies = data.draw(st.integers(1, min(room, num_bins)))
        items += [(data.draw(st.floats(0, 100)), number)] * copies
        number += 1
    bins = pack(items, num_bins, capacity)
    assert Counter(itertools.chain(*bins)) == Counter(items)
    assert all(len(held) == len(set(held)) == capacity for held in bins)


def test_experts_of_a_group_stay_on_one_host():
    chance = random.Random(2)
    loads = [chance.randint(90, 110) for _ in range(16)]
    placed = _place(loads, 8, 3, 2, 4)  # two hosts of four ranks, four groups of four experts
    host_of = {}
    for rank, held in enumerate(_per_rank(placed, 8)):
        for expert in held:
            host_of.setdefault(expert // 4, set()).add(rank // 4)
    assert all(len(hosts) == 1 for hosts in host_of.values())
    # Three slots for two experts a rank: 1.5 times the slots, so copies are on one host too.
    assert balancedness(rank_loads(loads, placed, 8)) > 0.9


def test_hosts_are_given_up_where_they_cost_balance():
    loads = [1000, *[10] * 7]
    placed = _place(loads, 4, 3, 2)  # on one host two ranks would share what four can
    assert all(0 in held for held in _per_rank(placed, 4))


def test_the_busiest_rank_is_not_the_same_in_every_layer():
    loads = {layer: [40, 10, 10, 10] for layer in range(4)}
    placement = balance(loads, RankLayout(4, 1))
    where = [placement.owners(layer, 0) for layer in loads]
    assert sorted(where) == [(0,), (1,), (2,), (3,)]


def test_balancedness():
    assert balancedness([1, 1, 1, 1]) == balancedness([0, 0]) == 1.0
    assert balancedness([3, 1, 0, 0]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ((4, 1), "--slots-per-rank 1 on 4 ranks makes 4 slots for 8 experts: each expert needs"),
        ((4, 1), "Use 2 to 8; with 2 there are 0 for copies."),
        ((4, 9), "makes 36 slots for 8 experts: a rank would hold an expert twice. Use 2 to 8"),
        ((4, 3, 1, 3), "--expert-groups 3 does not divide num_experts=8"),
        ((4, 3, 1, 0), "--expert-groups 0 does not divide num_experts=8"),
    ],
)
def test_slots_that_cannot_be_filled(layout, says):
    with pytest.raises(PlanError) as refused:
        balance({0: [1] * 8}, RankLayout(*layout))
    assert says in str(refused.value)
