"""Plans: groups against a table written out and DeepSpeed's own, and refusals by their messages."""

import itertools

import pytest
from deepspeed.utils.groups import _get_expert_parallel_ranks
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.errors import PlanError
from ds_moe_ep.hostfile import Cluster, parse_hostfile
from ds_moe_ep.model_spec import ModelSpec, model_spec_from_config
from ds_moe_ep.plan import (
    Coordinates,
    ParallelPlan,
    check_plan,
    make_plan,
    nearest_plans,
    valid_ep_sizes,
)

_GROUPS = ("tp_group", "ep_group", "edp_group", "dense_dp_group", "pp_group")
_PLANS = st.builds(ParallelPlan, *[st.integers(1, 3)] * 4)


def cluster(num_hosts: int, num_slots: int) -> Cluster:
    text = "".join(f"worker-{i} slots={num_slots}\n" for i in range(num_hosts))
    return parse_hostfile(text, "hostfile")


def olmoe_spec() -> ModelSpec:
    config = {
        "model_type": "olmoe",
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "vocab_size": 50304,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    return model_spec_from_config(config, source="config.json", name="OLMoE-1B-7B")


def dense_spec() -> ModelSpec:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "torch_dtype": "bfloat16",
    }
    return model_spec_from_config(config, source="config.json", name="small-llama")


# Groups


def test_ranks_count_tp_first_then_ep_dp_pp():
    plan = ParallelPlan(ep_size=2, tp_size=2, pp_size=2, dp_size=2)

    # By hand: rank = ((pp * 2 + dp) * 2 + ep) * 2 + tp.
    assert plan.coordinates(11) == Coordinates(pp_rank=1, dp_rank=0, ep_rank=1, tp_rank=1)
    assert plan.tp_group(11) == (10, 11)
    assert plan.ep_group(11) == (9, 11)
    assert plan.edp_group(11) == (11, 15)
    assert plan.dense_dp_group(11) == (9, 11, 13, 15)
    assert plan.pp_group(11) == (3, 11)
    for rank in (-1, 16):
        with pytest.raises(IndexError, match=f"rank {rank} is not one of 16 ranks"):
            plan.coordinates(rank)


def test_ep64_is_one_expert_group_and_64_dense_replicas():
    plan = ParallelPlan(64)

    assert (plan.world_size, plan.dense_dp_size, str(plan)) == (64, 64, "EP64 TP1 PP1 DP1")
    for rank in range(64):
        assert plan.ep_group(rank) == plan.dense_dp_group(rank) == tuple(range(64))
        assert plan.edp_group(rank) == plan.tp_group(rank) == plan.pp_group(rank) == (rank,)
    assert plan.identities() == (
        "experts: ep_size 64 * tp_size 1 * pp_size 1 * dp_size 1 = 64 GPUs",
        "dense: dense_dp_size 64 * tp_size 1 * pp_size 1 = 64 GPUs",
    )


@given(_PLANS)
def test_each_kind_of_group_cuts_the_ranks_into_equal_parts(plan):
    ranks = range(plan.world_size)
    sizes = (plan.tp_size, plan.ep_size, plan.dp_size, plan.dense_dp_size, plan.pp_size)
    assert [plan.rank(plan.coordinates(rank)) for rank in ranks] == list(ranks)
    for kind, size in zip(_GROUPS, sizes, strict=True):
        group_of = getattr(plan, kind)
        groups = {group_of(rank) for rank in ranks}
        assert sorted(itertools.chain.from_iterable(groups)) == list(ranks)
        assert {len(group) for group in groups} == {size}
        assert all(rank in group_of(rank) for rank in ranks)
        assert all(list(group) == sorted(group) for group in groups)


@given(_PLANS)
def test_ranks_of_one_group_differ_in_its_dimension_only(plan):
    free = {
        "tp_group": {"tp_rank"},
        "ep_group": {"ep_rank"},
        "edp_group": {"dp_rank"},
        "dense_dp_group": {"ep_rank", "dp_rank"},
        "pp_group": {"pp_rank"},
    }
    places = [vars(plan.coordinates(rank)) for rank in range(plan.world_size)]
    for kind in _GROUPS:
        fixed = [name for name in places[0] if name not in free[kind]]
        for rank, place in enumerate(places):
            same = [
                other
                for other, its in enumerate(places)
                if all(its[name] == place[name] for name in fixed)
            ]
            assert list(getattr(plan, kind)(rank)) == same


@given(_PLANS)
def test_expert_groups_are_those_deepspeed_makes(plan):
    expert, expert_data = _get_expert_parallel_ranks(
        plan.world_size, plan.tp_size, plan.ep_size, plan.pp_size
    )
    ranks = range(plan.world_size)
    assert {plan.ep_group(rank) for rank in ranks} == set(map(tuple, expert))
    assert {plan.edp_group(rank) for rank in ranks} == set(map(tuple, expert_data))


@pytest.mark.parametrize("number", [1, 2, 7, 12, 60, 64, 160, 256])
def test_valid_ep_sizes_are_the_divisors(number):
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    assert valid_ep_sizes(number) == divisors
    assert valid_ep_sizes(number, at_most=8) == [size for size in divisors if size <= 8]


# Plans that fit


@pytest.mark.parametrize(
    ("gpus", "sizes", "expected"),
    [
        ((8, 8), {}, ParallelPlan(64)),
        ((8, 8), {"ep_size": 64}, ParallelPlan(64)),
        ((8, 8), {"ep_size": 16, "dp_size": 4}, ParallelPlan(16, dp_size=4)),
        ((8, 8), {"dp_size": 4}, ParallelPlan(16, dp_size=4)),
        ((8, 8), {"tp_size": 2, "pp_size": 2}, ParallelPlan(16, tp_size=2, pp_size=2)),
        ((1, 1), {}, ParallelPlan(1)),
        ((2, 3), {"ep_size": 2, "dp_size": 3}, ParallelPlan(2, dp_size=3)),
    ],
)
def test_plans_that_fit(gpus, sizes, expected):
    assert make_plan(cluster(*gpus), olmoe_spec(), **sizes) == expected
    assert make_plan(cluster(*gpus), **sizes) == expected


def test_a_dense_model_is_planned_as_copies():
    plan = make_plan(cluster(1, 4), dense_spec(), ep_size=1, dp_size=4)
    assert plan == ParallelPlan(1, dp_size=4)


# Refusals


def _refusal(gpus: Cluster, spec: ModelSpec | None, **sizes: int | None) -> str:
    with pytest.raises(PlanError) as refused:
        make_plan(gpus, spec, **sizes)
    assert refused.value.exit_code == 2
    return str(refused.value)


def test_refuses_16384_gpus_on_64():
    message = _refusal(cluster(8, 8), olmoe_spec(), ep_size=64, tp_size=16, pp_size=4, dp_size=4)
    assert message.startswith(
        "EP64 TP16 PP4 DP4 needs 64 * 16 * 4 * 4 = 16,384 GPUs, but 64 are there "
        "(8 hosts x 8 slots, hostfile): 256x as many. "
        "Plans that fit 64 GPUs: EP64 TP1 PP1 DP1; "
    )


def test_refuses_everything_that_is_wrong_at_once():
    message = _refusal(cluster(8, 8), olmoe_spec(), ep_size=3, tp_size=32, pp_size=17)
    problems = (
        "ep_size=3 does not divide num_experts=64",
        "EP3 TP32 PP17 DP1 needs 3 * 32 * 17 * 1 = 1,632 GPUs, but 64 are there",
        ": 26x as many. ",
        "tp_size=32 does not divide num_attention_heads=16, num_key_value_heads=16 of OLMoE-1B-7B",
        "pp_size=17 is more than num_layers=16",
        "Plans that fit 64 GPUs: ",
    )
    places = [message.index(problem) for problem in problems]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("gpus", "sizes", "parts"),
    [
        (
            (8, 8),
            {"ep_size": 48},
            [
                "ep_size=48 does not divide num_experts=64 (layer 0 of OLMoE-1B-7B): every rank "
                "must own the same number of experts. Use ep_size in [1, 2, 4, 8, 16, 32, 64].",
                "Plans that fit 64 GPUs: EP64 TP1 PP1 DP1;",
            ],
        ),
        (
            (6, 8),
            {},
            [
                "ep_size=48, the default that fills the GPUs, does not divide num_experts=64",
                "Plans that fit 48 GPUs: EP16 TP1 PP1 DP3;",
                "On 32 of them: EP32 TP1 PP1 DP1.",
            ],
        ),
        ((16, 8), {}, ["ep_size=128, the default", "Plans that fit 128 GPUs: EP64 TP1 PP1 DP2;"]),
        (
            (8, 8),
            {"ep_size": 32},
            [
                "EP32 TP1 PP1 DP1 needs 32 * 1 * 1 * 1 = 32 GPUs",
                "32 would idle",
                "EP32 TP1 PP1 DP2",
            ],
        ),
        ((1, 1), {"ep_size": 2}, ["= 2 GPUs, but 1 are there", "2x as many", "fit 1 GPU: EP1 TP1"]),
        (
            (8, 8),
            {"tp_size": 3},
            ["tp_size=3 * pp_size=1 * dp_size=1 = 3 does not divide 64 GPUs", "no ep_size fills"],
        ),
        ((1, 4), {"dp_size": 8}, ["dp_size=8 = 8 does not divide 4 GPUs", "EP1 TP1 PP1 DP4"]),
        (
            (8, 8),
            {"ep_size": 2, "tp_size": 32},
            [
                "tp_size=32 does not divide num_attention_heads=16",
                "Use tp_size in [1, 2, 4, 8, 16]",
            ],
        ),
        (
            (8, 8),
            {"ep_size": 2, "pp_size": 32},
            ["pp_size=32 is more than num_layers=16 of OLMoE-1B-7B", "Use pp_size up to 16"],
        ),
        ((8, 8), {"ep_size": 0}, ["ep_size=0: every size is at least 1"]),
        ((8, 8), {"ep_size": 64, "tp_size": -1}, ["tp_size=-1: every size is at least 1"]),
        ((8, 8), {"dp_size": 0}, ["dp_size=0: every size is at least 1"]),
    ],
)
def test_refuses_with_numbers_and_alternatives(gpus, sizes, parts):
    message = _refusal(cluster(*gpus), olmoe_spec(), **sizes)
    for part in parts:
        assert part in message


def test_refuses_tensor_ranks_that_key_value_heads_do_not_divide():
    spec = olmoe_spec()
    grouped = ModelSpec(**{**vars(spec), "num_key_value_heads": 4})
    message = _refusal(cluster(8, 8), grouped, tp_size=8)
    assert "tp_size=8 does not divide num_key_value_heads=4" in message
    assert "Use tp_size in [1, 2, 4]" in message


def test_refuses_experts_for_a_dense_model_and_says_how_to_get_some():
    message = _refusal(cluster(8, 8), dense_spec())
    assert "small-llama (llama) has no MoE layer, so there are no experts to spread" in message
    assert "upcycle the model: copy each FFN into every expert" in message
    assert "Plans that fit 64 GPUs: EP1 TP1 PP1 DP64;" in message


@given(wanted=_PLANS, num_gpus=st.integers(1, 200), has_spec=st.booleans())
def test_plans_that_are_offered_fit(wanted, num_gpus, has_spec):
    spec = olmoe_spec() if has_spec else None
    offered = nearest_plans(wanted, num_gpus, spec)
    assert 1 <= len(offered) <= 4
    for plan in offered:
        check_plan(plan, cluster(1, num_gpus), spec)


@given(sizes=st.tuples(*[st.integers(-1, 70)] * 4), num_gpus=st.sampled_from([1, 8, 48, 64]))
def test_a_plan_is_made_exactly_if_the_numbers_allow_it(sizes, num_gpus):
    ep_size, tp_size, pp_size, dp_size = sizes
    allowed = (
        min(sizes) >= 1
        and ep_size * tp_size * pp_size * dp_size == num_gpus
        and 64 % ep_size == 0
        and 16 % tp_size == 0
        and pp_size <= 16
    )
    arguments = {"ep_size": ep_size, "tp_size": tp_size, "pp_size": pp_size, "dp_size": dp_size}
    if allowed:
        assert make_plan(cluster(1, num_gpus), olmoe_spec(), **arguments) == ParallelPlan(*sizes)
    else:
        _refusal(cluster(1, num_gpus), olmoe_spec(), **arguments)
