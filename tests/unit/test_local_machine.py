"""How many threads a rank gets."""

import os
import resource

import pytest

from ds_moe_ep.host_memory import proportional_bytes, resident_bytes, share_of_others_bytes
from ds_moe_ep.local_machine import num_usable_cores, threads_of_rank


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "expected"),
    [(2, 4, 1), (2, 2, 1), (16, 2, 8), (96, 8, 12), (7, 2, 3)],
)
def test_ranks_share_the_cores_they_may_use(monkeypatch, num_cores, num_ranks, expected):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
    assert threads_of_rank(num_ranks) == expected


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert num_usable_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on systems without it
    assert num_usable_cores() == 16


def test_what_the_user_has_set_stands(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads_of_rank(1) is None


def test_the_resident_set_is_what_the_system_counts():
    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the most there ever was
    resident, own = resident_bytes(), proportional_bytes()
    assert 0 < own <= resident <= 1.05 * usage


def test_pages_of_a_child_are_shared_with_it():
    pages = bytearray(os.urandom(1)) * (64 << 20)  # written, so ours
    before = share_of_others_bytes()
    child_may_end, parent_has_looked = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(child_may_end, 1)
        os._exit(0)
    try:
        shared = share_of_others_bytes()
    finally:
        os.write(parent_has_looked, b".")
        os.waitpid(child, 0)
        os.close(child_may_end)
        os.close(parent_has_looked)
    # Half of them is the child's share, and of what else this process holds at most half.
    assert shared - before >= 0.95 * len(pages) / 2
    assert share_of_others_bytes() <= before + 0.05 * len(pages)
