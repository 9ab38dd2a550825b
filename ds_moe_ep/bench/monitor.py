"""`bench monitor`: what it costs to watch a job, as infer.py --metrics does."""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ds_moe_ep.adapter import moe_layers
from ds_moe_ep.bench.generate_sides import load_ours
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.monitor.metrics_format import Sample
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.sampler import Sampler, Usage

__all__ = ["TABLE"]

_PLAIN, _WATCHED = "not watched", "watched"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[2, 4], help="numbers of ranks")
    parser.add_argument("--model", choices=SHAPES, default="105M")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64], help="prompts in all")
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--dispatcher", default="auto")


def _prepare(args: argparse.Namespace, work: Path) -> None:
    write_model(SHAPES[args.model], work / args.model)


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    _, plain = load_ours(work / args.model, job, args.dispatcher)
    model, generate = load_ours(work / args.model, job, args.dispatcher)
    recorder = Recorder(model, moe_layers(model), device=job.device)

    def watched(prompts_BS: Tensor, num_new: int) -> Tensor | None:
        recorder.start_batch()
        completed = generate(prompts_BS, num_new)
        recorder.start_step(1 + recorder.windows.num_steps)  # a window ends
        return completed

    sample_s = _time_samples(job, args.rounds)
    results = []
    for batch in args.batch:
        generator = torch.Generator().manual_seed(batch)
        size = batch, args.prompt_tokens
        prompts_BS = torch.randint(3, SHAPES[args.model].vocab_size, size, generator=generator)
        sides = {_PLAIN: plain, _WATCHED: watched}
        for side in sides.values():
            side(prompts_BS, args.new_tokens)
        seconds = time_in_turn(
            {n: functools.partial(side, prompts_BS, args.new_tokens) for n, side in sides.items()},
            args.rounds,
            wait_for_all=lambda: job.wait_for_all(args.timeout, "generating"),
            slowest=lambda taken: max(job.all_gather(taken)),
        )
        results.append(
            {
                "world_size": job.info.world_size,
                "batch": batch,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "sample_s": vars(sample_s),
                "seconds": {name: vars(spread) for name, spread in seconds.items()},
            }
        )
    return results


def _time_samples(job: Job, num_rounds: int) -> Spread:
    """Times a look at this rank and, on rank 0, at all; returns seconds of the slowest rank."""
    usage = Usage(job.device)

    def look() -> Sample:
        return Sample(
            t_s=time.perf_counter(),
            rank=job.info.rank,
            utilisation=usage.utilisation(),
            memory_bytes=usage.memory_bytes(),
            step=0,
            new_tokens=0,
            prompts_done=0,
            prompts_queued=0,
            batch_size=0,
            at="",
        )

    store = job.roll_call.store if job.roll_call else None
    sampler = Sampler(job.info.rank, job.info.world_size, look, store)
    job.all_gather(None)  # all have left a sample
    seconds = []
    for _ in range(num_rounds):
        start = time.perf_counter()
        sampler.sample()
        if job.info.rank == 0:
            sampler.tell()
        seconds.append(max(job.all_gather(time.perf_counter() - start)))
    return Spread.of(seconds)


def _to_markdown(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        seconds, sample_s = result["seconds"], result["sample_s"]
        hooks = seconds[_WATCHED]["median"] / seconds[_PLAIN]["median"] - 1
        row = [result["world_size"], result["batch"]]
        row += [with_range(seconds[name]) for name in (_PLAIN, _WATCHED)]
        row += [f"{hooks:+.1%}", with_range(sample_s, scale=1e3, digits=1)]
        rows.append([*row, f"{hooks + sample_s['median']:+.1%}"])
    titles = ["ranks", "prompts", f"{_PLAIN}, s", f"{_WATCHED}, s", "cost of hooks"]
    titles += ["a sample, ms", "cost in all"]
    first = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"{first['new_tokens']} tokens are generated after prompts of {first['prompt_tokens']}, "
        "with and without the hooks on all passes of `infer.py --metrics`. Each second a rank also "
        "takes a sample, which goes by the store to rank 0. Times are the median (least to most) "
        f"of {first['seconds'][_PLAIN]['num_rounds']} rounds, the slowest rank's."
    )


TABLE = Table(
    name="monitor",
    heading="Watching a job",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
)
