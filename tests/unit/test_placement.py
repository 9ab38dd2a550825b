"""Where experts live: one owner each, equal shares, totals that come out at the model's size."""

import pytest

from ds_moe_ep.hostfile import Cluster, Host
from ds_moe_ep.model_spec import ModelSpec, model_spec_from_config
from ds_moe_ep.placement import (
    Placement,
    assignment_matrix,
    group_table,
    make_placement,
    stage_moe_layers,
)
from ds_moe_ep.plan import ParallelPlan
from tests.unit.test_plan import cluster, dense_spec, olmoe_spec

_PLANS = [
    ParallelPlan(64),
    ParallelPlan(8),
    ParallelPlan(1),
    ParallelPlan(8, dp_size=4),
    ParallelPlan(4, tp_size=2, pp_size=2, dp_size=2),
    ParallelPlan(2, pp_size=3),
    ParallelPlan(1, tp_size=4),
]


def _deepseek_like() -> ModelSpec:
    """Seven layers of which the first is dense, so that pipeline stages are unequal."""
    config = {
        "model_type": "glm4_moe",
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "n_routed_experts": 64,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    return model_spec_from_config(config, source="config.json", name="small")


def test_expert_37_of_layer_5():
    assert make_placement(ParallelPlan(64), olmoe_spec()).owner(5, 37) == 37
    assert make_placement(ParallelPlan(16), olmoe_spec()).owner(5, 37) == 9
    assert make_placement(ParallelPlan(1), olmoe_spec()).owner(5, 37) == 0


@pytest.mark.parametrize("ep_size", [1, 2, 4, 8, 16, 32, 64])
def test_every_expert_has_one_owner_that_knows_it(ep_size):
    placement = make_placement(ParallelPlan(ep_size), olmoe_spec())

    assert placement.num_local_experts * ep_size == 64
    owned = [expert for ep_rank in range(ep_size) for expert in placement.local_experts(ep_rank)]
    assert owned == list(range(64))
    for ep_rank in range(ep_size):
        for expert in placement.local_experts(ep_rank):
            assert {placement.owner(layer, expert) for layer in range(16)} == {ep_rank}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: p.owner(0, 3), r"layer 0 is not one of the MoE layers \(1, 2\)"),
        (lambda p: p.owner(1, 8), "expert 8 is not one of 8 experts"),
        (lambda p: p.owner(1, -1), "expert -1 is not one of 8 experts"),
        (lambda p: p.local_experts(4), "ep_rank 4 is not one of 4"),
        (lambda p: p.local_experts(-1), "ep_rank -1 is not one of 4"),
    ],
)
def test_what_is_not_there_has_no_owner(call, message):
    with pytest.raises(IndexError, match=message):
        call(Placement(num_experts=8, ep_size=4, moe_layers=(1, 2)))


def test_one_expert_of_every_layer_on_each_of_64_gpus():
    spec = olmoe_spec()
    matrix = assignment_matrix(ParallelPlan(64), spec, cluster(8, 8))

    assert [row.rank for row in matrix] == list(range(64))
    assert [row.experts for row in matrix] == [(rank,) for rank in range(64)]
    assert [(row.host, row.slot) for row in matrix[6:10]] == [
        ("worker-0", 6),
        ("worker-0", 7),
        ("worker-1", 0),
        ("worker-1", 1),
    ]
    assert {row.num_layers for row in matrix} == {16}
    assert {row.num_expert_instances for row in matrix} == {16}
    assert sum(row.num_expert_instances for row in matrix) == 1024
    assert {row.expert_memory_share for row in matrix} == {1 / 64}
    assert {row.expected_load_share for row in matrix} == {1 / 64}
    assert {row.expert_bytes for row in matrix} == {2 * 100_663_296}
    assert {row.dense_bytes for row in matrix} == {2 * spec.num_dense_params}


@pytest.mark.parametrize("plan", _PLANS, ids=str)
@pytest.mark.parametrize("spec", [olmoe_spec(), _deepseek_like()], ids=lambda spec: spec.name)
def test_shares_and_bytes_add_up(plan, spec):
    matrix = assignment_matrix(plan, spec, cluster(1, plan.world_size))

    assert sum(row.expert_memory_share for row in matrix) == pytest.approx(plan.dp_size)
    assert sum(row.expected_load_share for row in matrix) == pytest.approx(1)
    expert_bytes = spec.num_expert_params * spec.param_bytes
    assert sum(row.expert_bytes for row in matrix) == expert_bytes * plan.dp_size
    # One tensor rank stands for all: they hold parts of the same experts.
    instances = sum(
        row.num_expert_instances for row in matrix if plan.coordinates(row.rank).tp_rank == 0
    )
    assert instances == len(spec.moe_layers) * spec.num_experts * plan.dp_size


def test_a_dense_model_has_only_dense_bytes():
    plan = ParallelPlan(1, dp_size=2)
    for row in assignment_matrix(plan, dense_spec(), cluster(1, 2)):
        assert (row.experts, row.num_layers, row.expert_bytes) == ((), 0, 0)
        assert (row.expert_memory_share, row.expected_load_share) == (0.0, 0.0)
        assert row.dense_bytes == dense_spec().num_params * 2


@pytest.mark.parametrize("pp_size", [1, 2, 3, 7])
def test_stages_cut_the_layers_into_even_runs(pp_size):
    spec = _deepseek_like()
    stages = [stage_moe_layers(ParallelPlan(1, pp_size=pp_size), spec, i) for i in range(pp_size)]

    assert tuple(layer for stage in stages for layer in stage) == spec.moe_layers
    assert [len(stage) for stage in stages] == {
        1: [6],
        2: [2, 4],
        3: [1, 2, 3],
        7: [0, 1, 1, 1, 1, 1, 1],
    }[pp_size]


def test_slots_are_the_hosts_own():
    part = Cluster((Host("a", (1, 3)), Host("b", (0, 2))), "hostfile")
    matrix = assignment_matrix(ParallelPlan(4), olmoe_spec(), part)
    assert [(row.host, row.slot) for row in matrix] == [("a", 1), ("a", 3), ("b", 0), ("b", 2)]


def test_the_group_table_has_a_row_for_every_rank():
    plan = ParallelPlan(2, tp_size=2, pp_size=2, dp_size=2)
    table = group_table(plan)

    assert [row.rank for row in table] == list(range(16))
    for row in table:
        assert row.coordinates == plan.coordinates(row.rank)
        for kind in ("tp_group", "ep_group", "edp_group", "dense_dp_group", "pp_group"):
            assert getattr(row, kind) == getattr(plan, kind)(row.rank)
