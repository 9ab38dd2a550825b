"""How many threads a rank gets."""

import os
import resource

import pytest

from ds_moe_ep.host_memory import proportional_bytes, resident_bytes
from ds_moe_ep.local_machine import threads_of_rank


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "expected"),
    [(2, 4, 1), (2, 2, 1), (16, 2, 8), (96, 8, 12), (7, 2, 3)],
)
def test_ranks_share_the_cores_they_may_use(monkeypatch, num_cores, num_ranks, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    assert threads_of_rank(num_ranks) == expected


def test_what_the_user_has_set_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of_rank(1) is None


def test_the_resident_set_is_what_the_system_counts():
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the most there ever was
    resident, own = resident_bytes(), proportional_bytes()
    assert 0 < own <= resident <= 1.05 * usage
