"""How long groups wait: all as long as the job's own, not as long as torch likes."""

import math
import time
from dataclasses import replace
from datetime import timedelta

import pytest
import torch.distributed as dist

from ds_moe_ep.dist import group_timeout
from ds_moe_ep.dist.group_timeout import timeout_of
from ds_moe_ep.dist.groups import RankInfo, create_expert_groups, init_distributed
from ds_moe_ep.dist.node_groups import create_node_groups
from tests.helpers import run_ranks


def _timeouts(rank: int, world_size: int) -> list[timedelta]:
    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    of_experts = create_expert_groups(world_size)
    of_nodes = create_node_groups(world_size, [0, 0, 1, 1])
    assert of_nodes is not None
    groups = (dist.group.WORLD, of_experts, of_nodes.across, of_nodes.within)
    return [timeout_of(group) for group in groups]


def test_every_group_waits_as_long_as_the_default_group(tmp_path):
    for timeouts in run_ranks(_timeouts, 4, tmp_path):
        assert len(timeouts) == 4
        assert set(timeouts) == {timeouts[0]}


def _load_slowly(rank: int, world_size: int, slow_rank: int) -> bool:
    job = init_distributed(RankInfo(rank, rank, world_size), timeout_s=1, start_timeout_s=60)
    # The default group is that of the tests here, with a timeout of theirs.
    job = replace(job, control=dist.new_group(backend="gloo", timeout=timedelta(seconds=1)))
    if rank == slow_rank:
        time.sleep(4)
    job.wait_for_all(60, "loading weights")
    return True


@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_rank_may_load_for_longer_than_any_later_wait(slow_rank: int, tmp_path):
    assert all(run_ranks(_load_slowly, 3, tmp_path, slow_rank))


@pytest.mark.parametrize(
    ("timeout_s", "expected_s"), [(150.0, 120.0), (40.0, 20.0), (None, math.inf)]
)
def test_a_rank_that_waits_for_its_gpu_ends_before_the_watchdog(monkeypatch, timeout_s, expected_s):
    timeout = None if timeout_s is None else timedelta(seconds=timeout_s)
    monkeypatch.setattr(group_timeout, "timeout_of", lambda group: timeout)
    assert group_timeout.patience_of(dist.ProcessGroup(0, 1)) == expected_s
    assert group_timeout.patience_of(None) == math.inf
