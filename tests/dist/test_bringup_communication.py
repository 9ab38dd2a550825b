"""Phase 2 on real ranks: right values pass, wrong ones are named by collective, group and rank."""

from unittest import mock

import torch

from ds_moe_ep.bringup import communication
from ds_moe_ep.bringup.communication import DecodeSize, check_values, wrong_values
from ds_moe_ep.bringup.host_pairs import check_pairs
from ds_moe_ep.bringup.report import FAIL, PASS, WARN
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.groups import Job, RankInfo
from ds_moe_ep.moe.dispatch import Links
from tests.helpers import run_ranks


class _Broken(Communicator):
    """Loses what one rank has: its sums and its last gathered row are wrong on rank 1."""

    def sum_over_ranks(self, partial_TC, meanwhile=None):
        return super().sum_over_ranks(partial_TC) + (self.rank == 1)

    def gather_rows(self, tensors, counts, meanwhile=None):
        (rows_RC,) = super().gather_rows(tensors, counts)
        return (rows_RC * (torch.arange(len(rows_RC))[:, None] < len(rows_RC) - self.rank),)


def _latency(target_ms, *args, **kwargs):
    with mock.patch.object(communication, "TARGET_MS", target_ms):
        return communication.check_latency(*args, **kwargs)


def _phase_2(rank, world_size):
    group = torch.distributed.group.WORLD
    hosts, nodes = tuple(f"h{r // 2}" for r in range(world_size)), tuple(range(world_size))
    nodes = tuple(node // 2 for node in nodes)
    job = Job(RankInfo(rank, rank % 2, world_size), torch.device("cpu"), group, None, nodes, hosts)
    good, broken = Links(Communicator(group)), Links(_Broken(group))
    size = DecodeSize(3, 16, 2, torch.float32)
    return {
        "wrong": wrong_values(good.flat, job.device),
        "alone": wrong_values(Communicator(None), job.device),
        "good": check_values(job, good),
        "broken": check_values(job, broken),
        "slow": _latency(0.0, job, good, size, thorough=False),
        "quick": _latency(1e6, job, good, size, thorough=True),
        "pairs": check_pairs(job, 64, thorough=True),
    }


def test_values_and_times_of_three_ranks_on_two_hosts(tmp_path):
    ranks = run_ranks(_phase_2, 3, tmp_path)
    assert all(found == ranks[0] for found in ranks[1:])  # the same verdicts everywhere
    (found, *_) = ranks
    assert (found["wrong"], found["alone"], found["good"].verdict) == ([], [], PASS)
    broken = found["broken"]
    assert broken.verdict == FAIL
    assert "[rank 1 h0] all-gather flat of 3" in broken.reason
    assert "[rank 1 h0] all-reduce flat of 3" in broken.reason
    assert "[rank 2 h1] all-gather flat of 3" in broken.reason
    assert "rank 0" not in broken.reason and "all-to-all" not in broken.reason
    (slow,), (quick,) = found["slow"], found["quick"]
    assert (slow.verdict, quick.verdict) == (WARN, PASS)
    assert "3 x 16 float32 a rank, 3 ranks; target 0" in slow.reason
    assert slow.measured is not None and slow.measured > 0
    assert "slowest is h0 - h1: " in found["pairs"].reason
