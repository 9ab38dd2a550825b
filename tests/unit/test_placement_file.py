"""placement.json comes back as it was, and is refused where it is not whole or not for a job."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.config.placement_file import check_placement, placement_json, read_placement
from ds_moe_ep.errors import ConfigError, PlanError
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan
from tests.unit.test_plan import olmoe_spec

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
        ({"num_experts": 5}, "placement.json: Value error, layer 1 has no slot with expert 4"),
        ({"num_experts": 2**70}, "is more than the 6 slots of num_ranks=2 with slots_per_rank=3"),
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
