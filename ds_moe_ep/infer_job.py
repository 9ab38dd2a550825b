"""One inference job from options to outputs, as each rank runs it.

prepare (all that can be refused before a weight is read, in engine/prepare.py) -> load -> bring up
(four phases that judge what there is, in bringup/) -> run -> gather -> write and report.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ds_moe_ep import host_memory
from ds_moe_ep.bringup.phases import BringUp
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.console import progress_bar
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.decoding import end_ids
from ds_moe_ep.engine.journal import Journal, fingerprint
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.loaded_job import LoadedJob
from ds_moe_ep.engine.loading import Engine, load_engine
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.outputs import GenerateResult, Result, write_results
from ds_moe_ep.engine.prepare import Work, prepare, replays_passes
from ds_moe_ep.engine.summary import RankSummary, format_summary
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.engine.sync import ForwardSync, shared_by_all
from ds_moe_ep.engine.tasks import (
    EncodedPrompt,
    GenerateSettings,
    generate_batch,
    score_batch,
)
from ds_moe_ep.engine.together import run_together
from ds_moe_ep.errors import some
from ds_moe_ep.monitor.job_monitor import JobMonitor, watch
from ds_moe_ep.monitor.metrics_folder import check_metrics_folder
from ds_moe_ep.whole_file import remove_unfinished

__all__ = ["run_job"]

_SHOWN_CHARS = 40


def run_job(options: JobOptions, progress: Progress) -> int:
    """Runs the job on this rank.

    Args:
        options: What the user asked for.
        progress: Told where this rank is.

    Returns:
        The exit code. On rank 0 the summary was printed, or by one rank why the job broke.
    """
    return run_together(
        lambda job: _run_joined(options, job, progress), options, progress, options.journal_folder
    )


def _run_joined(options: JobOptions, job: Job, progress: Progress) -> None:
    """Runs the job once the ranks have met."""
    progress.enter("reading the input")
    work = job.all_or_none(
        lambda: _prepare(options, job), what="reading the input", timeout_s=options.timeout_s
    )
    journal = Journal(options.journal_folder, job.info.rank)
    earlier, left, settings = _left_to_do(options, job, work, journal)
    bring_up = BringUp(options, job, work, left)
    progress.enter("comparing hosts")
    bring_up.check_before_loading()
    progress.enter("loading weights")
    engine = load_engine(options, job, work)
    progress.enter("bringing up")
    batches = bring_up.run(engine)
    if options.preflight:
        return
    loaded = LoadedJob(
        options,
        job,
        work,
        engine,
        batches,
        progress,
        live_rows=LiveRows(end_ids(engine.deepspeed_engine.module.generation_config), job.device),
        graph=_decode_graph(options, job, engine, bring_up, progress),
        predicted_bytes=bring_up.predicted_bytes,
        available_bytes=bring_up.available_bytes,
    )
    _check_free(loaded, journal)
    with watch(loaded) as monitor:
        _start_journal(loaded, journal, settings)
        results, summary = _run(loaded, journal, monitor)
        progress.enter("writing the results")
        _finish(loaded, earlier | results, summary, journal, monitor)
    if loaded.graph is not None:
        loaded.graph.close()


def _prepare(options: JobOptions, job: Job) -> Work:
    work = prepare(options, job)
    if job.info.rank == 0 and options.metrics is not None:
        check_metrics_folder(options.metrics)
    return work


def _left_to_do(
    options: JobOptions, job: Job, work: Work, journal: Journal
) -> tuple[dict[int, Result], list[int], dict[str, Any]]:
    """Returns the results of a run that is resumed, what is left, by index, and the fingerprint.

    Rank 0 alone has the results and the fingerprint, which takes reading a little of all weights.
    """

    def look_back() -> tuple[dict[int, Result], dict[str, Any]]:
        if job.info.rank != 0 or options.preflight:
            return {}, {}
        journal.check_free()
        prompts = [each.prompt for each in work.prompts]
        settings = fingerprint(options, str(work.dtype), prompts)
        return (journal.read(settings) if options.resume else {}), settings

    earlier, settings = job.all_or_none(
        look_back, what="looking for work", timeout_s=options.start_timeout_s
    )
    finished = set(job.all_gather(list(earlier))[0])
    if finished and job.info.rank == 0:
        print(f"resuming: {len(finished)} of {len(work.prompts)} prompts are done", flush=True)
    left = [index for index in range(len(work.prompts)) if index not in finished]
    return earlier, left, settings


def _check_free(loaded: LoadedJob, journal: Journal) -> None:
    """Looks once more for another job that writes this output: it may write these metrics too."""
    job = loaded.job
    job.all_or_none(
        lambda: journal.check_free() if job.info.rank == 0 else None,
        what="looking for another job",
        timeout_s=loaded.options.timeout_s,
    )


def _start_journal(loaded: LoadedJob, journal: Journal, settings: dict[str, Any]) -> None:
    """Lets go of what earlier runs have left, when nothing is left for which to refuse the job."""
    options, job = loaded.options, loaded.job

    def start() -> None:
        if job.info.rank == 0:
            journal.start(settings, resume=options.resume)
            remove_unfinished(options.output)

    def join() -> None:
        if job.info.rank != 0 and loaded.batches and loaded.has_own_prompts:
            journal.join()

    for step in (start, join):
        job.all_or_none(step, what="starting the journal", timeout_s=options.timeout_s)


def _run(
    loaded: LoadedJob, journal: Journal, monitor: JobMonitor | None
) -> tuple[dict[int, Result], RankSummary]:
    """Serves this rank's batches and takes part in those of the others."""
    job, work, engine, progress = loaded.job, loaded.work, loaded.engine, loaded.progress

    def start_step(step: int) -> None:
        progress.start_step(step)
        if monitor is not None:
            monitor.start_step(step)

    job.wait_for_all(loaded.options.timeout_s, "starting the first batch")
    start = time.perf_counter()
    if monitor is not None:
        monitor.start()
    with progress_bar(len(work.prompts)) as show:
        sync = ForwardSync(
            engine.deepspeed_engine.module,
            engine.layers,
            dist.group.WORLD,
            top_k=work.spec.top_k,
            dtype=work.dtype,
            device=job.device,
            shared=shared_by_all(engine.layers, job.info.world_size),
            on_progress=show,
            on_step=start_step,
            live_rows=loaded.live_rows,
            graph=loaded.graph,
        )
        results = _serve_batches(loaded, sync, journal, monitor)
        progress.enter("helping the others to their end")
        if monitor is not None:
            monitor.end_batches()
        sync.join_others()
    sync.close()
    return results, _summarise(loaded, results, sync.num_steps, time.perf_counter() - start)


def _serve_batches(
    loaded: LoadedJob, sync: ForwardSync, journal: Journal, monitor: JobMonitor | None
) -> dict[int, Result]:
    """Returns the results of this rank's prompts, by index; of a replicated batch on rank 0."""
    serve = _server(loaded)
    results: dict[int, Result] = {}
    for number, batch in enumerate(loaded.batches, start=1):
        prompts = [loaded.work.prompts[index] for index in batch.indices]
        ids = some([repr(each.prompt.id)[:_SHOWN_CHARS] for each in prompts])
        loaded.progress.enter(f"batch {number} of {len(loaded.batches)} (prompts {ids})")
        if monitor is not None:
            monitor.start_batch(len(prompts))
        done = dict(zip(batch.indices, serve(prompts), strict=True))
        if loaded.has_own_prompts:
            journal.append(done)
            results |= done
            sync.finish(len(done))
    return results


def _decode_graph(
    options: JobOptions, job: Job, engine: Engine, bring_up: BringUp, progress: Progress
) -> DecodeGraph | None:
    """Returns what replays decode passes, if the user wants it and there are any."""
    if not replays_passes(options) or not bring_up.largest_batch:
        return None
    progress.enter("capturing a decode pass")
    return DecodeGraph(
        engine.deepspeed_engine.module,
        engine.layers,
        world_size=job.info.world_size,
        batch_size=bring_up.largest_batch,
        cache_len=bring_up.longest_tokens,
        timeout_s=options.timeout_s,
    )


def _server(loaded: LoadedJob) -> Callable[[list[EncodedPrompt]], Sequence[Result]]:
    """Returns what serves a batch of prompts under the user's task."""
    options, work, engine = loaded.options, loaded.work, loaded.engine.deepspeed_engine
    if options.task == "score":
        return lambda prompts: score_batch(engine, prompts, loaded.live_rows)
    settings = GenerateSettings(
        max_new_tokens=options.max_new_tokens,
        context_length=work.context_length,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    return lambda prompts: generate_batch(
        engine, prompts, settings, work.tokenizer, loaded.live_rows, loaded.graph
    )


def _summarise(
    loaded: LoadedJob, results: dict[int, Result], num_steps: int, run_s: float
) -> RankSummary:
    job, layers = loaded.job, [layer.deepspeed_moe for layer in loaded.engine.layers]
    prompts = loaded.work.prompts
    return RankSummary(
        rank=job.info.rank,
        host=job.info.host,
        dispatcher=layers[0].describe_dispatch(),
        num_prompts=len(results),
        prompt_tokens=sum(len(prompts[index].token_ids) for index in results),
        new_tokens=sum(len(r.token_ids) for r in results.values() if isinstance(r, GenerateResult)),
        expert_rows=sum(int(layer.tokens_per_expert.sum()) for layer in layers),
        load_s=loaded.engine.load_s,
        run_s=run_s,
        comm_s=sum(layer.stats.seconds() for layer in layers),
        comm_bytes=sum(layer.stats.sent_bytes for layer in layers),
        num_steps=num_steps,
        num_replays=0 if loaded.graph is None else loaded.graph.num_replays,
        peak_memory_bytes=_peak_memory_bytes(job.device),
    )


def _finish(
    loaded: LoadedJob,
    results: dict[int, Result],
    summary: RankSummary,
    journal: Journal,
    monitor: JobMonitor | None,
) -> None:
    """Brings the results of all ranks into one file, tells how it went, and clears up."""
    options, job = loaded.options, loaded.job
    record = monitor.finish(summary) if monitor is not None else None
    gathered = job.gather((results, summary, record))

    def write() -> None:
        if job.info.rank != 0:
            return
        by_index = {index: result for own, _, _ in gathered for index, result in own.items()}
        ranks = [summary for _, summary, _ in gathered]
        write_results(options.output, [by_index[i] for i in range(len(loaded.work.prompts))])
        if monitor is not None:
            monitor.write([record for _, _, record in gathered if record is not None])
        text = format_summary(ranks, task=options.task, output=options.output)
        print(text, flush=True)

    job.all_or_none(write, what="writing the results", timeout_s=options.timeout_s)
    job.is_done.set()
    if job.info.local_rank == 0:
        journal.remove()


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return peak_bytes - host_memory.share_of_others_bytes()
