"""The helper that runs functions on ranks: values come back, no failure is silent or endless."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from tests.helpers import run_ranks


def _sum_of_ranks(rank, world_size, factor):
    total = torch.tensor([float(rank * factor)])
    dist.all_reduce(total)
    environment = (os.environ["RANK"], os.environ["DS_ACCELERATOR"], torch.get_num_threads())
    return rank, world_size, total, environment


def _rank_1_fails_the_others_wait(rank, world_size):
    if rank == 1:
        raise ValueError("broken on purpose")
    _wait_for_ever()


def _rank_1_hangs(rank, world_size):
    if rank == 1:
        _wait_for_ever()
    return "done"


def _rank_0_is_killed(rank, world_size):
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def _returns_a_lambda(rank, world_size):
    return lambda: rank


def _wait_for_ever():
    time.sleep(3600)


def test_returns_the_values_of_all_ranks_in_order(tmp_path):
    results = run_ranks(_sum_of_ranks, 2, tmp_path, torch.tensor(10))
    assert [rank for rank, *_ in results] == [0, 1]
    for rank, world_size, total, environment in results:
        assert world_size == 2
        assert total.item() == 10.0
        assert environment == (str(rank), "cpu", 1)


def test_a_failing_rank_ends_the_others_and_shows_every_rank(tmp_path):
    start_s = time.monotonic()
    with pytest.raises(AssertionError) as error:
        run_ranks(_rank_1_fails_the_others_wait, 2, tmp_path, timeout_s=300)
    message = str(error.value)
    assert message.startswith("[rank 1] raised:\nTraceback")
    assert "ValueError: broken on purpose" in message
    assert "[rank 0] was still running after another rank had failed:" in message
    assert "_wait_for_ever" in message  # where it was
    assert time.monotonic() - start_s < 200


def test_a_hanging_rank_is_ended_and_named(tmp_path):
    with pytest.raises(AssertionError) as error:
        run_ranks(_rank_1_hangs, 2, tmp_path, timeout_s=15)
    message = str(error.value)
    assert "[rank 1] was still running after 15 s:" in message
    assert "_wait_for_ever" in message
    assert "rank 0" not in message


def test_a_killed_rank_is_named_with_its_exit_code(tmp_path):
    with pytest.raises(AssertionError, match=r"\[rank 0\] died without a report \(exit code -9\)"):
        run_ranks(_rank_0_is_killed, 1, tmp_path)


def test_a_value_that_cannot_be_returned_is_an_error_of_its_rank(tmp_path):
    with pytest.raises(AssertionError, match=r"\[rank 0\] raised:(?s:.*)pickle"):
        run_ranks(_returns_a_lambda, 1, tmp_path)
