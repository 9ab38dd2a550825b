"""All that watches one job, on each rank: the recorder of its passes, the sampler, who listens.

infer.py makes one where metrics were asked for; without one nothing is watched and nothing is
slower.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime, timezone

import torch
import torch.distributed as dist

from ds_moe_ep.bringup.phases import BringUp
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.loading import Engine
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.prepare import Work
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.monitor.deepspeed_events import DeepSpeedEvents
from ds_moe_ep.monitor.folder_writer import FolderWriter
from ds_moe_ep.monitor.metrics_format import Run, Sample
from ds_moe_ep.monitor.prometheus import Exporter
from ds_moe_ep.monitor.rank_record import RankRecord
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.sampler import Sampler, Usage

__all__ = ["JobMonitor", "watch"]

_PACKAGES = ("ds_moe_ep", "torch", "deepspeed", "transformers", "accelerate")


class JobMonitor:
    """What watches a job on this rank.

    Args:
        options: What the user asked for.
        job: The job.
        work: What was settled before loading.
        engine: The loaded model.
        bring_up: What was predicted of the memory.
        progress: Where this rank is.
        live_rows: Counts the tokens that passes give.
        num_prompts: Prompts that this rank is to serve.
    """

    def __init__(
        self,
        options: JobOptions,
        job: Job,
        work: Work,
        engine: Engine,
        bring_up: BringUp,
        progress: Progress,
        live_rows: LiveRows,
        num_prompts: int,
    ) -> None:
        self._job, self._work, self._engine = job, work, engine
        self._progress = progress
        self._num_prompts, self._num_begun, self._batch_size = num_prompts, 0, 0
        self._begun_s = time.perf_counter()
        self._usage = Usage(job.device)
        counts_tokens = options.batch_mode == "sharded" or job.info.rank == 0
        self._recorder = Recorder(
            engine.deepspeed_engine.module,
            engine.layers,
            device=job.device,
            counts_tokens=counts_tokens,
        )
        self._live_rows = live_rows if counts_tokens and options.task == "generate" else None
        self._folder: FolderWriter | None = None
        self._listeners: list[Callable[[Sequence[Sample]], None]] = []
        self._open: list[Exporter | DeepSpeedEvents] = []
        if job.info.rank == 0:
            self._listen(options, bring_up)
        self._sampler = Sampler(
            job.info.rank, job.info.world_size, self._look, _store(job), self._listeners
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
        stats = [layer.deepspeed_moe.stats for layer in self._engine.layers]
        return RankRecord.of(summary, self._recorder, self._sampler.samples, stats)

    def write(self, ranks: Sequence[RankRecord]) -> None:
        """Writes, on rank 0, what all ranks have recorded; all have finished before.

        Raises:
            ResourceError: It cannot be written.
        """
        self._sampler.tell()
        if self._folder is not None:
            self._folder.finish(ranks, self._work.spec.moe_layers)

    def close(self) -> None:
        """Gives the port of the exporter back, and what else is open."""
        for each in self._open:
            each.close()

    def _listen(self, options: JobOptions, bring_up: BringUp) -> None:
        if options.metrics is not None:
            run = _run(options, self._job, self._work, self._engine, bring_up)
            self._folder = FolderWriter(options.metrics, run)
            self._listeners.append(self._folder.add_samples)
        if options.metrics_port is not None:
            self._open.append(Exporter(options.metrics_port))
        if self._work.monitor_config:
            self._open.append(DeepSpeedEvents(self._work.monitor_config))
        self._listeners += [each.update for each in self._open]

    def _look(self) -> Sample:
        where = str(self._progress).partition(", step")[0].partition(" (")[0]
        num_done = self._num_begun - self._batch_size
        return Sample(
            t_s=time.perf_counter() - self._begun_s,
            rank=self._job.info.rank,
            utilisation=self._usage.utilisation(),
            memory_bytes=self._usage.memory_bytes(),
            step=self._progress.step,
            new_tokens=0 if self._live_rows is None else self._live_rows.num_completing,
            prompts_done=num_done,
            prompts_queued=self._num_prompts - self._num_begun,
            batch_size=self._batch_size,
            at=where,
        )


@contextlib.contextmanager
def watch(
    options: JobOptions,
    job: Job,
    work: Work,
    engine: Engine,
    bring_up: BringUp,
    progress: Progress,
    live_rows: LiveRows,
    num_prompts: int,
) -> Iterator[JobMonitor | None]:
    """Yields what watches the job; None where nobody asked for metrics.

    Raises:
        ResourceError: On every rank: the folder cannot be written, or the port cannot be had.
    """
    if not (options.metrics or options.metrics_port or work.monitor_config):
        yield None
        return
    monitor = job.all_or_none(
        lambda: JobMonitor(options, job, work, engine, bring_up, progress, live_rows, num_prompts),
        what="opening the metrics",
        timeout_s=options.timeout_s,
    )
    try:
        yield monitor
    finally:
        monitor.close()


def _store(job: Job) -> dist.Store | None:
    return job.roll_call.store if job.roll_call is not None else None


def _run(options: JobOptions, job: Job, work: Work, engine: Engine, bring_up: BringUp) -> Run:
    plan = work.plan
    is_gpu = job.device.type == "cuda"
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return Run.model_validate(
        {
            "version": 1,
            "command": sys.argv,
            "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": str(options.model),
            "model_type": work.spec.model_type,
            "plan": {
                **asdict(plan),
                "world_size": plan.world_size,
                "dense_dp_size": plan.dense_dp_size,
            },
            "task": options.task,
            "dtype": str(work.dtype).removeprefix("torch."),
            "dispatcher": engine.layers[0].deepspeed_moe.dispatcher_name,
            "batch_mode": options.batch_mode,
            "hosts": list(job.hosts),
            "device": torch.cuda.get_device_name(job.device) if is_gpu else "cpu",
            "versions": {"python": platform.python_version(), **versions},
            "moe_layers": list(work.spec.moe_layers),
            "num_experts": work.spec.num_experts,
            "top_k": work.spec.top_k,
            "predicted_memory_bytes": bring_up.predicted_bytes,
            "available_memory_bytes": bring_up.available_bytes,
        }
    )
