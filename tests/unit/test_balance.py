"""Placements for recorded loads: near the best there is, never worse than what was, and as told."""

import itertools
import json
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
from ds_moe_ep.cli import main
from ds_moe_ep.config.placement_file import check_placement, placement_json, read_placement
from ds_moe_ep.config.recorded import read_expert_loads, read_recorded_cluster
from ds_moe_ep.errors import ConfigError, PlanError
from ds_moe_ep.packing import pack
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan
from tests.unit.test_plan import olmoe_spec


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


_SMALL = SlotPlacement(4, 2, 3, {1: (0, 1, 2, 0, 1, 3), 2: (0, 1, 3, 0, 2, 3)})


def test_where_the_copies_of_an_expert_are():
    assert _SMALL.owners(1, 0) == (0, 1)
    assert _SMALL.owners(2, 2) == (1,)
    assert _SMALL.local_experts(2, 1) == (0, 2, 3)
    for call in (
        lambda: _SMALL.owners(0, 0),
        lambda: _SMALL.owners(1, 4),
        lambda: _SMALL.local_experts(1, 2),
    ):
        with pytest.raises(IndexError, match="is not one of"):
            call()


def test_a_placement_comes_back_from_its_file(tmp_path):
    path = tmp_path / "placement.json"
    path.write_text(placement_json(_SMALL))
    assert read_placement(path) == _SMALL
    assert '{"layer": 2, "expert_of_slot": [0, 1, 3, 0, 2, 3]}' in path.read_text()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 2}, "version=2"),
        ({"num_rank": 2}, "unknown key 'num_rank' (did you mean 'num_ranks'?)"),
        ({"num_ranks": 3}, "layer 1 fills 6 slots, num_ranks=3 with slots_per_rank=3 have 9"),
        ({"num_experts": 5}, "layer 1 has no slot with expert 4"),
        ({"num_experts": 3}, "layer 1 has expert 3, num_experts=3 are numbered from 0"),
        ({"layers": []}, "layers=[]"),
        ({"layers": 2 * [{"layer": 1, "expert_of_slot": [0]}]}, "layers [1, 1] are not in"),
    ],
)
def test_a_placement_that_is_not_whole(tmp_path, change, says):
    path = tmp_path / "placement.json"
    path.write_text(json.dumps(json.loads(placement_json(_SMALL)) | change))
    with pytest.raises(ConfigError) as refused:
        read_placement(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert says in str(refused.value)


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*json.loads(placement_json(_SMALL)), "more"]), _json)
def test_any_value_of_a_field_is_taken_or_refused(tmp_path_factory, key, value):
    path = tmp_path_factory.getbasetemp() / "any-placement.json"
    path.write_text(json.dumps(json.loads(placement_json(_SMALL)) | {key: value}))
    try:
        read = read_placement(path)
    except ConfigError as refused:
        assert str(refused).startswith(f"{path}: ")
    else:
        assert read == _SMALL


def test_a_placement_of_another_model_or_other_ranks(tmp_path):
    spec, source = olmoe_spec(), tmp_path / "p.json"
    fitting = SlotPlacement(64, 8, 8, dict.fromkeys(range(16), tuple(range(64))))
    check_placement(fitting, ParallelPlan(8), spec, source)
    with pytest.raises(ConfigError, match=r"places 4 experts in 2 layers, numbers 1 to 2; .* has"):
        check_placement(_SMALL, ParallelPlan(2), spec, source)
    with pytest.raises(PlanError, match=r"num_ranks=8, but .* ep_size=4. Use --ep-size 8 .*"):
        check_placement(fitting, ParallelPlan(4), spec, source)


@pytest.fixture
def recorded(tmp_path):
    """Four ranks on two hosts; of eight experts the first has half the load."""
    loads = {1: [70, 10, 10, 10, 10, 10, 10, 10], 2: [10, 10, 10, 10, 10, 10, 10, 70]}
    lines = [json.dumps({"layer": n, "tokens_per_expert": x}) for n, x in loads.items()]
    (tmp_path / "experts.jsonl").write_text("\n".join(lines) + "\n")
    ranks = [{"rank": rank, "host": f"worker-{rank // 2}", "run_s": 1.5} for rank in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, ranks)) + "\n")
    return tmp_path


def test_what_was_recorded_is_read(recorded):
    assert read_expert_loads(recorded)[2] == (10, 10, 10, 10, 10, 10, 10, 70)
    hosts = read_recorded_cluster(recorded).hosts
    assert [(host.name, host.slots) for host in hosts] == [
        ("worker-0", (0, 1)),
        ("worker-1", (0, 1)),
    ]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"layer": 2, "tokens_per_expert": [1]}', "layer 2 is there twice"),
        ('{"layer": 3, "tokens_per_expert": [1]}', "layer 3 has 1 experts, the layers before it 8"),
        ('{"layer": 3, "tokens_per_expert": [-1]}', "tokens_per_expert.0=-1"),
        ('{"layer": 3, "tokens": [1]}', "tokens_per_expert is missing; unknown key 'tokens'"),
        ("[1]", "a JSON object ({...}) is needed"),
        ('{"layer": 3', "not valid JSON"),
    ],
)
def test_loads_that_cannot_be_read(recorded, line, says):
    path = recorded / "experts.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError) as refused:
        read_expert_loads(recorded)
    assert str(refused.value).startswith(f"{path}:3")
    assert says in str(refused.value)


def test_a_folder_without_records(tmp_path):
    with pytest.raises(ConfigError, match=r"has no experts.jsonl.*--metrics DIR"):
        read_expert_loads(tmp_path)
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl.*--num-ranks N"):
        read_recorded_cluster(tmp_path)


def _said(capsys, *args):
    code = main(["balance", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_tells_and_writes(recorded, capsys):
    out = recorded / "placement.json"
    code, told, _ = _said(capsys, recorded, "--slots-per-rank", 3, "--out", out)
    assert code == 0
    # Contiguous: 80, 20, 20, 20 and 20, 20, 20, 80 of 140, so 35 / 80, and 70 / 100 together.
    assert (
        "contiguous  balancedness 0.700 overall, 0.438 layer by layer (least: 0.438 in layer 1)"
        in told
    )
    assert "4 on 2 hosts" in told
    assert "1 expert of a layer more on each rank: 50% more expert weights" in told
    placement = read_placement(out)
    assert (placement.num_ranks, placement.slots_per_rank) == (4, 3)
    assert len(placement.owners(1, 0)) > 1 < len(placement.owners(2, 7))
    assert f"infer.py --placement {out}" in told


def test_without_spare_slots_the_command_says_what_one_would_give(recorded, capsys):
    _, moved, _ = _said(capsys, recorded)
    _, copied, _ = _said(capsys, recorded, "--slots-per-rank", 3)
    assert "for which a pass waits, is 0% less" in moved
    # Whatever moves: 80, 20, 20, 20 of 140 in each layer, so 35 / 80, and 70 / 100 together.
    assert "placed  balancedness 0.700 overall, 0.438 layer by layer" in moved
    would = moved.split("--slots-per-rank 3, it would be ")[1].split()[0]
    assert f"{would} layer by layer (least" in copied.split("placed  ")[1]


def test_one_rank_has_nobody_to_share_with(recorded, capsys):
    code, told, _ = _said(capsys, recorded, "--num-ranks", 1)
    assert code == 0
    assert "contiguous  balancedness 1.000 overall" in told
    assert "There is one rank" in told


def test_one_expert_a_rank_cannot_be_balanced(recorded, capsys):
    code, told, _ = _said(capsys, recorded, "--num-ranks", 8)
    assert code == 0
    assert "contiguous  balancedness 0.438 overall, 0.250 layer by layer" in told
    assert "so nothing can be balanced" in told
    assert "With copies of the hottest, --slots-per-rank 2, it would be 0." in told
    out = recorded / "placement.json"
    code, _, refused = _said(capsys, recorded, "--num-ranks", 8, "--out", out)
    assert code == 2
    assert refused.startswith(f"PlanError: {out} is not written: each rank holds one expert")
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--num-ranks", 3), "3 ranks cannot hold equally many of 8 experts"),
        (("--ep-size", 3), "--ep-size 3 does not divide the 4 ranks of"),
        (("--out", "/nowhere/placement.json"), "mkdir -p /nowhere"),
        (("--hostfile", "/nowhere"), "/nowhere: cannot be read"),
    ],
)
def test_refusals(recorded, capsys, args, says):
    code, _, refused = _said(capsys, recorded, *args)
    assert code == 2
    assert says in refused
