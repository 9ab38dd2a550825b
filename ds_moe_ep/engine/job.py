"""One inference job from options to outputs, as each rank runs it.

prepare (all that can be refused before a weight is read, in prepare.py) -> load -> run -> gather ->
write and report.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import deepspeed
import torch
import torch.distributed as dist
from torch import nn

from ds_moe_ep.adapter import bind_expert_groups, moe_layers
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import Job, create_expert_groups, init_distributed, read_rank_info
from ds_moe_ep.engine.console import only_rank_0_prints, progress_bar, quiet_libraries
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.outputs import GenerateResult, ScoreResult, write_results
from ds_moe_ep.engine.prepare import Work, prepare
from ds_moe_ep.engine.summary import RankSummary, format_summary, write_metrics
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.engine.tasks import EncodedPrompt, GenerateSettings, generate_batch, score_batch
from ds_moe_ep.errors import DsMoeEpError
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["init_inference", "run_job"]

T = TypeVar("T")
Result = GenerateResult | ScoreResult


@dataclass(frozen=True)
class Engine:
    """A loaded model, ready to run on this rank."""

    deepspeed_engine: Any
    layers: list[ExpertParallelMoE]
    load_s: float


def run_job(options: JobOptions) -> int:
    """Runs the job on this rank.

    Returns:
        The exit code. On rank 0 the summary was printed, or the error that all ranks agree on.
    """
    info = read_rank_info()
    quiet_libraries()
    with only_rank_0_prints(info.rank):
        job = init_distributed(info, timeout_s=options.timeout_s)
    try:
        work = _all_or_none(job, lambda: prepare(options, job))
        engine = _load(options, job, work)
        _run(options, job, work, engine)
    except DsMoeEpError as error:
        if info.rank == 0:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        # A rank that ends first makes the launcher end the others, rank 0 perhaps unheard.
        job.wait_for_all(options.timeout_s, "ending the job")
        return error.exit_code
    dist.destroy_process_group()
    return 0


def init_inference(model: nn.Module, config: dict[str, Any]) -> Any:
    """Calls ``deepspeed.init_inference`` and undoes the one thing it does too much.

    It converts every tensor of the model to the dtype of `config`, also those that transformers
    keeps in float32 on purpose: the rotary frequencies and the routers' correction biases, whose
    rounding would change positions and routing.
    """
    kept = {
        name: tensor.detach().clone()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.is_floating_point() and tensor.dtype != model.dtype
    }
    engine = deepspeed.init_inference(model, config=config)
    for name, tensor in kept.items():
        holder_name, _, attribute = name.rpartition(".")
        getattr(model.get_submodule(holder_name), attribute).data = tensor
    return engine


def _all_or_none(job: Job, step: Callable[[], T]) -> T:
    """Runs a step that any rank may refuse; all ranks go on together or fail together."""
    try:
        value = step()
    except DsMoeEpError as error:
        job.agree(error)
        raise
    job.agree(None)
    return value


def _load(options: JobOptions, job: Job, work: Work) -> Engine:
    start = time.perf_counter()
    create_expert_groups(work.plan.ep_size)

    def load() -> nn.Module:
        model, report = load_expert_parallel_model(
            options.model,
            work.plan,
            ep_rank=work.plan.coordinates(job.info.rank).ep_rank,
            dtype=work.dtype,
            device=job.device,
            dispatcher=options.dispatcher,
        )
        if job.info.rank == 0:
            print(f"{report}; weights in {work.dtype}", flush=True)
        job.wait_for_all(options.load_timeout_s, "loading weights")
        return model

    model = _all_or_none(job, load)
    with only_rank_0_prints(job.info.rank):
        bind_expert_groups(model)
        engine = init_inference(model, work.deepspeed_config)
    return Engine(engine, moe_layers(model), time.perf_counter() - start)


def _run(options: JobOptions, job: Job, work: Work, engine: Engine) -> None:
    own = work.batches[job.info.rank]
    serve = _server(options, job, work, engine)
    results: dict[int, Result] = {}
    job.wait_for_all(options.timeout_s, "starting the first batch")
    start = time.perf_counter()
    with progress_bar(len(work.prompts)) as show:
        sync = ForwardSync(
            engine.deepspeed_engine.module,
            engine.layers,
            engine.layers[0].deepspeed_moe.ep_group,
            hidden_size=work.spec.hidden_size,
            top_k=work.spec.top_k,
            dtype=work.dtype,
            device=job.device,
            on_progress=show if job.info.rank == 0 else None,
        )
        for batch in own:
            prompts = [work.prompts[index] for index in batch.indices]
            results.update(zip(batch.indices, serve(prompts), strict=True))
            sync.finish(len(prompts))
        sync.join_others()
    summary = _summarise(job, work, engine, results, sync.num_steps, time.perf_counter() - start)
    _report(options, work, job.gather((results, summary)), engine)


def _server(
    options: JobOptions, job: Job, work: Work, engine: Engine
) -> Callable[[list[EncodedPrompt]], Sequence[Result]]:
    """Returns what serves a batch of prompts under the user's task."""
    if options.task == "score":
        return lambda prompts: score_batch(engine.deepspeed_engine, prompts, job.device)
    settings = GenerateSettings(
        max_new_tokens=options.max_new_tokens,
        context_length=work.context_length,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    return lambda prompts: generate_batch(
        engine.deepspeed_engine, prompts, settings, work.tokenizer, job.device
    )


def _summarise(
    job: Job,
    work: Work,
    engine: Engine,
    results: dict[int, Result],
    num_steps: int,
    run_s: float,
) -> RankSummary:
    stats = [layer.deepspeed_moe.stats for layer in engine.layers]
    return RankSummary(
        rank=job.info.rank,
        host=job.info.host,
        num_prompts=len(results),
        prompt_tokens=sum(len(work.prompts[index].token_ids) for index in results),
        new_tokens=sum(len(r.token_ids) for r in results.values() if isinstance(r, GenerateResult)),
        expert_rows=sum(
            int(layer.deepspeed_moe.tokens_per_expert.sum()) for layer in engine.layers
        ),
        load_s=engine.load_s,
        run_s=run_s,
        comm_s=sum(stat.seconds() for stat in stats),
        comm_bytes=sum(stat.sent_bytes for stat in stats),
        num_steps=num_steps,
        peak_memory_bytes=_peak_memory_bytes(job.device),
    )


def _report(options: JobOptions, work: Work, gathered: list, engine: Engine) -> None:
    """Writes and prints on rank 0, where `gathered` holds the results of all ranks."""
    if not gathered:
        return
    by_index = {index: result for results, _ in gathered for index, result in results.items()}
    write_results(options.output, [by_index[index] for index in range(len(work.prompts))])
    ranks = [summary for _, summary in gathered]
    if options.metrics is not None:
        write_metrics(options.metrics, ranks)
    dispatcher = type(engine.layers[0].deepspeed_moe.dispatcher).__name__
    print(
        format_summary(ranks, task=options.task, dispatcher=dispatcher, output=options.output),
        flush=True,
    )


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
