"""The same ranks stand together in our plan, in DeepSpeed's groups and in Megatron's."""

import pytest
import torch.distributed as dist
from deepspeed.utils.groups import _get_expert_parallel_ranks
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.plan import ParallelPlan

PLANS = [
    ParallelPlan(ep_size=64),
    ParallelPlan(ep_size=8, dp_size=4),
    ParallelPlan(ep_size=1, dp_size=4),
    ParallelPlan(ep_size=4, tp_size=2),
    ParallelPlan(ep_size=4, tp_size=2, dp_size=2),
    ParallelPlan(ep_size=4, pp_size=2, dp_size=2),
    ParallelPlan(ep_size=2, tp_size=2, pp_size=2, dp_size=2),
    ParallelPlan(ep_size=4, tp_size=4, pp_size=2),
]


def megatron_groups(plan, rank):
    """Return the ranks that Megatron puts with one rank, by the names of our plan's functions."""
    from megatron.core import parallel_state

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=plan.world_size)
    try:
        parallel_state.initialize_model_parallel(
            plan.tp_size,
            plan.pp_size,
            expert_model_parallel_size=plan.ep_size,
            expert_tensor_parallel_size=plan.tp_size,
            create_gloo_process_groups=False,
        )
        groups = {
            "tp_group": parallel_state.get_tensor_model_parallel_group(),
            "ep_group": parallel_state.get_expert_model_parallel_group(),
            "edp_group": parallel_state.get_expert_data_parallel_group(),
            "dense_dp_group": parallel_state.get_data_parallel_group(),
            "pp_group": parallel_state.get_pipeline_model_parallel_group(),
        }
        return {name: tuple(dist.get_process_group_ranks(group)) for name, group in groups.items()}
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_megatron_groups_as_the_plan_does(plan):
    for rank in range(plan.world_size):
        found = megatron_groups(plan, rank)
        assert found == {name: getattr(plan, name)(rank) for name in found}


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_deepspeed_groups_as_the_plan_does(plan):
    expert_parallel, expert_data_parallel = _get_expert_parallel_ranks(
        plan.world_size, plan.tp_size, plan.ep_size, plan.pp_size
    )
    ranks = range(plan.world_size)
    assert {*map(tuple, expert_parallel)} == {plan.ep_group(rank) for rank in ranks}
    assert {*map(tuple, expert_data_parallel)} == {plan.edp_group(rank) for rank in ranks}


@pytest.mark.parametrize(
    ("tp_size", "pp_size", "words"),
    [(16, 4, "1 is not divisible by 64"), (16, 1, "4 is not"), (1, 4, "16 is not divisible by 64")],
)
def test_deepspeed_has_no_groups_for_the_plan_that_started_this_project(tp_size, pp_size, words):
    with pytest.raises(AssertionError, match=words):
        _get_expert_parallel_ranks(64, tp_size, 64, pp_size)
