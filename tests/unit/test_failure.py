"""Who says why a job broke, where the store that ranks agree through was lost with rank 0."""

import multiprocessing
import os
import time
from types import SimpleNamespace

from ds_moe_ep.dist.groups import RankInfo
from ds_moe_ep.engine import failure
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.errors import DistributedError
from tests.helpers.launch import free_port

_ANSWER_S = 1.0


class _LostStore:
    """What a `RollCall` says without one."""

    def answer(self) -> None:
        return None


def _find_out(rank: int, after_s: float) -> None:
    job = SimpleNamespace(roll_call=_LostStore(), hosts=["worker-1"] * 4)
    time.sleep(after_s)
    error = DistributedError("rank 0 (worker-1) was last heard of 15 s ago.")
    progress = Progress("loading weights")
    os._exit(failure.fail(error, RankInfo(rank, rank, 4), job, progress, None))


def test_ranks_that_find_out_one_after_the_other_say_it_once(monkeypatch, capfd):
    """The first has ended before the last would have spoken for itself."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.setattr(failure, "_ANSWER_S", _ANSWER_S)
    monkeypatch.setattr(failure, "_HOLD_S", 2 * _ANSWER_S)
    fork = multiprocessing.get_context("fork")
    after_s = {1: 0.0, 2: 0.3 * _ANSWER_S, 3: 0.6 * _ANSWER_S}
    ranks = [fork.Process(target=_find_out, args=each) for each in after_s.items()]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    assert [each.exitcode for each in ranks] == [1, 1, 1]
    said = capfd.readouterr().err
    assert said.count("DistributedError: ") == 1, said
    assert "was last heard of 15 s ago. No answer from rank 0 (worker-1)." in said
