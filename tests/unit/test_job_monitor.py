"""What a rank tells of itself while a job runs, so that sums over ranks are those of the job."""

from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep import host_memory
from ds_moe_ep.engine.loaded_job import LoadedJob
from ds_moe_ep.engine.schedule import Batch
from ds_moe_ep.monitor.figures import JobNow, figures
from ds_moe_ep.monitor.job_monitor import JobMonitor
from ds_moe_ep.monitor.sampler import Usage


class _Progress:
    step = 9

    def __str__(self):
        return "batch 2 of 3, step 9"


def _sample(rank, batch_mode, task="generate"):
    """A rank that is in its second batch of four of twelve prompts."""
    loaded = LoadedJob(
        options=SimpleNamespace(batch_mode=batch_mode, task=task),
        job=SimpleNamespace(info=SimpleNamespace(rank=rank)),
        work=None,
        engine=None,
        batches=[Batch((first, first + 1, first + 2, first + 3)) for first in (0, 4, 8)],
        progress=_Progress(),
        live_rows=SimpleNamespace(num_completing=30),
    )
    monitor = object.__new__(JobMonitor)
    monitor._loaded, monitor._begun_s = loaded, 0.0
    monitor._num_begun, monitor._batch_size = 8, 4
    monitor._usage = SimpleNamespace(utilisation=lambda: 0.5, memory_bytes=lambda: 1000)
    monitor._recorder = SimpleNamespace(collectives=lambda: (6, 0.25))
    return monitor._look()


@pytest.mark.parametrize(("batch_mode", "times"), [("sharded", 4), ("replicated", 1)])
def test_prompts_of_a_replicated_batch_are_counted_once(batch_mode, times):
    found = figures(JobNow([_sample(rank, batch_mode) for rank in range(4)]))
    assert found["prompts_done"] == 4 * times
    assert found["prompts_queued"] == 4 * times
    assert found["new_tokens"] == 30 * times


def test_a_rank_that_helps_with_a_replicated_batch_tells_what_it_works_on():
    sample = _sample(3, "replicated")
    assert (sample.prompts_done, sample.prompts_queued, sample.batch_size) == (0, 0, 4)
    assert (sample.step, sample.at, sample.collectives) == (9, "batch 2 of 3", 6)


def test_scored_prompts_are_counted_without_new_tokens():
    sample = _sample(0, "replicated", task="score")
    assert (sample.prompts_done, sample.prompts_queued, sample.new_tokens) == (4, 4, 0)


def test_a_gpu_that_cannot_tell_how_busy_it_is_ends_no_job(monkeypatch):
    def cannot(device):
        raise Exception("Not Supported")  # the driver's own kind, which is no RuntimeError

    monkeypatch.setattr(torch.cuda, "utilization", cannot)
    monkeypatch.setattr(host_memory, "share_of_others_bytes", lambda: 0)
    usage = Usage(torch.device("cuda", 0))
    with pytest.warns(UserWarning, match=r"how busy cuda:0 is \(Not Supported\): recorded as 0"):
        assert usage.utilisation() == 0.0
