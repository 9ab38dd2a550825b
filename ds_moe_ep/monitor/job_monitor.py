"""All that watches one job, on each rank: the recorder of its passes, the sampler, who listens.

infer.py makes one where metrics were asked for; without one nothing is watched and nothing is
slower.
"""

from __future__ import annotations

import contextlib
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ds_moe_ep import __version__
from ds_moe_ep.config.plan_file import SizesSection
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.loaded_job import LoadedJob
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.monitor.deepspeed_events import DeepSpeedEvents
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.folder_writer import FolderWriter
from ds_moe_ep.monitor.metrics_format import VERSION, Run, Sample
from ds_moe_ep.monitor.rank_record import RankRecord
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.sampler import Sampler, Usage
from ds_moe_ep.placement import make_placement

if TYPE_CHECKING:
    from ds_moe_ep.monitor.prometheus import Exporter

__all__ = ["JobMonitor", "watch"]

_LIBRARIES = ("torch", "deepspeed", "transformers", "accelerate")


class JobMonitor:
    """What watches a job on this rank.

    Args:
        loaded: The job.
    """

    def __init__(self, loaded: LoadedJob) -> None:
        job = loaded.job
        self._loaded = loaded
        self._num_begun, self._batch_size = 0, 0
        self._begun_s = time.perf_counter()
        self._usage = Usage(job.device)
        self._recorder = Recorder(
            loaded.engine.deepspeed_engine.module,
            loaded.engine.layers,
            device=job.device,
            splits_decode=not (loaded.options.cuda_graphs and job.device.type == "cuda"),
        )
        self._folder: FolderWriter | None = None
        self._listeners: list[Callable[[JobNow], None]] = []
        self._open: list[Exporter | DeepSpeedEvents] = []
        if job.info.rank == 0:
            self._listen()
        self._sampler = Sampler(
            job.info.rank,
            job.info.world_size,
            self._look,
            self._recorder.borders.recent,
            _store(job),
            self._listeners,
        )

    def start(self) -> None:
        """Starts; every rank has made its monitor before."""
        self._begun_s = time.perf_counter()
        self._sampler.start()

    def start_batch(self, num_prompts: int) -> None:
        """Is told of each batch as it begins."""
        self._num_begun += num_prompts
        self._batch_size = num_prompts
        self._recorder.start_batch()

    def start_step(self, step: int) -> None:
        """Is told of each forward pass that this rank takes part in, from 1 on."""
        self._recorder.start_step(step)

    def end_batches(self) -> None:
        """Is told when this rank has no batch left."""
        self._batch_size = 0

    def finish(self, summary: RankSummary) -> RankRecord:
        """Ends watching and returns what this rank has recorded."""
        self._recorder.close()
        self._sampler.stop()
        return RankRecord.of(
            summary,
            self._recorder,
            self._sampler.utilisation,
            [layer.deepspeed_moe for layer in self._loaded.engine.layers],
            _experts_here(self._loaded),
        )

    def write(self, ranks: Sequence[RankRecord]) -> None:
        """Writes, on rank 0, what all ranks have recorded; all have finished before."""
        self._sampler.tell()
        if self._folder is not None:
            self._folder.finish(ranks)

    def close(self) -> None:
        """Gives the port of the exporter back, and what else is open."""
        for each in self._open:
            each.close()

    def _listen(self) -> None:
        options, work = self._loaded.options, self._loaded.work
        if options.metrics is not None:
            self._folder = FolderWriter(options.metrics, _run(self._loaded))
            self._listeners.append(self._folder.add)
        if options.metrics_port is not None:
            from ds_moe_ep.monitor.prometheus import Exporter  # one rank needs it, if any

            self._open.append(Exporter(options.metrics_port))
        if work.monitor_config:
            self._open.append(DeepSpeedEvents(work.monitor_config))
        self._listeners += [each.update for each in self._open]

    def _look(self) -> Sample:
        loaded = self._loaded
        where = str(loaded.progress).partition(", step")[0].partition(" (")[0]
        num_done, num_queued, num_new_tokens = 0, 0, 0
        if loaded.has_own_prompts:
            num_done = self._num_begun - self._batch_size
            num_queued = loaded.num_prompts - self._num_begun
            if loaded.options.task == "generate":
                num_new_tokens = loaded.live_rows.num_completing
        collectives, collectives_s = self._recorder.collectives()
        return Sample(
            t_s=time.perf_counter() - self._begun_s,
            rank=loaded.job.info.rank,
            utilisation=self._usage.utilisation(),
            memory_bytes=self._usage.memory_bytes(),
            step=loaded.progress.step,
            new_tokens=num_new_tokens,
            prompts_done=num_done,
            prompts_queued=num_queued,
            batch_size=self._batch_size,
            collectives=collectives,
            collectives_s=collectives_s,
            at=where,
        )


@contextlib.contextmanager
def watch(loaded: LoadedJob) -> Iterator[JobMonitor | None]:
    """Yields what watches the job; None where nobody asked for metrics.

    Raises:
        ResourceError: On every rank: the folder cannot be written, or the port cannot be had.
    """
    if not _is_asked_for(loaded):
        yield None
        return
    monitor = loaded.job.all_or_none(
        lambda: JobMonitor(loaded),
        what="opening the metrics",
        timeout_s=loaded.options.timeout_s,
    )
    try:
        yield monitor
    finally:
        monitor.close()


def _is_asked_for(loaded: LoadedJob) -> bool:
    options = loaded.options
    return bool(options.metrics or options.metrics_port or loaded.work.monitor_config)


def _store(job: Job) -> dist.Store | None:
    return job.roll_call.store if job.roll_call is not None else None


def _experts_here(loaded: LoadedJob) -> list[Sequence[int]]:
    """Returns the experts that this rank holds, slot by slot, for each MoE layer."""
    work = loaded.work
    ep_rank = work.plan.coordinates(loaded.job.info.rank).ep_rank
    if work.placement is not None:
        return [work.placement.local_experts(layer, ep_rank) for layer in work.spec.moe_layers]
    held = make_placement(work.plan, work.spec).local_experts(ep_rank)
    return [held] * len(work.spec.moe_layers)


def _run(loaded: LoadedJob) -> Run:
    options, job, work = loaded.options, loaded.job, loaded.work
    is_gpu = job.device.type == "cuda"
    # Our own is not asked of what is installed: a checkout can be run that is not.
    versions = {"ds_moe_ep": __version__, **{name: version(name) for name in _LIBRARIES}}
    return Run.model_validate(
        {
            "version": VERSION,
            "command": sys.argv,
            "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": str(options.model),
            "model_type": work.spec.model_type,
            "plan": SizesSection.of(work.plan),
            "task": options.task,
            "dtype": str(work.dtype).removeprefix("torch."),
            "dispatcher": loaded.engine.layers[0].deepspeed_moe.dispatcher_name,
            "batch_mode": options.batch_mode,
            "hosts": list(job.hosts),
            "device": torch.cuda.get_device_name(job.device) if is_gpu else "cpu",
            "versions": {"python": platform.python_version(), **versions},
            "moe_layers": list(work.spec.moe_layers),
            "num_experts": work.spec.num_experts,
            "top_k": work.spec.top_k,
            "predicted_memory_bytes": loaded.predicted_bytes,
            "available_memory_bytes": loaded.available_bytes,
            "slots_per_rank": work.placement and work.placement.slots_per_rank,
        }
    )
