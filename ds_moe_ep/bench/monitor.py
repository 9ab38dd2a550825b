"""`bench monitor`: what it costs to watch a job, as infer.py --metrics does."""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ds_moe_ep.adapter import moe_layers
from ds_moe_ep.bench.generate_sides import (
    GenerateSide,
    add_batch_arguments,
    check_batches,
    load_ours,
)
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.monitor.metrics_format import Sample
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.sampler import Sampler, Usage

__all__ = ["TABLE"]

_ROUNDS, _SAMPLES = 36, 100


@dataclass(frozen=True)
class _Spent:
    """What generating once took.

    Attributes:
        wall_s: Seconds of the slowest rank.
        cpu_s: CPU seconds of all ranks together, of all their threads.
    """

    wall_s: float
    cpu_s: float


@dataclass(frozen=True)
class _Cost:
    """How much more something takes if it is watched, by pairs that ran one after the other.

    Attributes:
        share: By which the watched one of a pair takes more: the mean of the middle half of all
            pairs, as other work on the machine may hit either one of a pair hard.
        standard_error: Of that mean.
        low: The least of the middle half.
        high: The most.
    """

    share: float
    standard_error: float
    low: float
    high: float

    @classmethod
    def of(cls, plain: Sequence[float], watched: Sequence[float]) -> _Cost:
        """Compares what each pair took.

        Source: standard error of a trimmed mean by the Winsorised deviation, Tukey and McLaughlin
        (1963).
        """
        more = sorted(b / a - 1 for a, b in zip(plain, watched, strict=True))
        cut = len(more) // 4
        middle = more[cut : len(more) - cut]
        winsorised = [middle[0]] * cut + middle + [middle[-1]] * cut
        deviation = statistics.stdev(winsorised) if len(more) > 1 else math.nan
        error = deviation / (len(middle) / len(more) * math.sqrt(len(more)))
        return cls(statistics.mean(middle), error, middle[0], middle[-1])

    def __str__(self) -> str:
        spread = f"{self.low:+.1%} to {self.high:+.1%}"
        return f"{self.share:+.1%} +- {self.standard_error:.1%} ({spread})"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(rounds=_ROUNDS)
    add_batch_arguments(parser, world=[2, 4], new_tokens=9)
    parser.add_argument("--prompt-tokens", type=int, default=16, help="tokens of each prompt")
    parser.add_argument(
        "--dispatcher", default="auto", help="as for launch/infer.py (default: %(default)s)"
    )


def _prepare(args: argparse.Namespace, work: Path) -> None:
    if args.dispatcher != "allreduce":  # with which every rank has them all
        check_batches(args.batch, args.world)
    write_model(SHAPES[args.model], work / args.model)


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    model, generate = load_ours(work / args.model, job, args.dispatcher)
    sample_cpu_s = _cpu_of_a_sample(model, job)
    results = []
    for batch in args.batch:
        generator = torch.Generator().manual_seed(batch)
        size = batch, args.prompt_tokens
        prompts_BS = torch.randint(3, SHAPES[args.model].vocab_size, size, generator=generator)
        plain, watched = _pairs(args, job, model, generate, prompts_BS)
        results.append(
            {
                "world_size": job.info.world_size,
                "batch": batch,
                "prompt_tokens": args.prompt_tokens,
                "new_tokens": args.new_tokens,
                "sample_cpu_s": sample_cpu_s,
                "seconds": {
                    name: vars(Spread.of([each.wall_s for each in side]))
                    for name, side in (("not watched", plain), ("watched", watched))
                },
                "plain": [asdict(each) for each in plain],
                "watched": [asdict(each) for each in watched],
            }
        )
    return results


def _pairs(
    args: argparse.Namespace,
    job: Job,
    model: PreTrainedModel,
    generate: GenerateSide,
    prompts_BS: Tensor,
) -> tuple[list[_Spent], list[_Spent]]:
    """Generates with and without hooks on the same model, one after the other, in either order."""

    def plainly() -> _Spent:
        return _spent(args, job, lambda: generate(prompts_BS, args.new_tokens))

    def watched() -> _Spent:
        recorder = Recorder(model, moe_layers(model), device=job.device)

        def work() -> None:
            recorder.start_batch()
            generate(prompts_BS, args.new_tokens)
            for step in range(1, args.new_tokens + 1):
                recorder.start_step(step)

        try:
            return _spent(args, job, work)
        finally:
            recorder.close()

    chance = random.Random(0)  # the same orders on all ranks
    for side in (plainly, watched):
        side()  # nobody's first time is counted
    pairs = []
    for _ in range(args.rounds):
        if chance.random() < 0.5:
            pairs.append((plainly(), watched()))
        else:
            pairs.append((watched(), plainly())[::-1])
    plain_ones, watched_ones = zip(*pairs, strict=True)
    return list(plain_ones), list(watched_ones)


def _spent(args: argparse.Namespace, job: Job, work: Callable[[], object]) -> _Spent:
    job.wait_for_all(args.timeout, "generating")
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    spent = time.perf_counter() - wall_s, time.process_time() - cpu_s
    walls_s, cpus_s = zip(*job.all_gather(spent), strict=True)
    return _Spent(max(walls_s), sum(cpus_s))


def _cpu_of_a_sample(model: PreTrainedModel, job: Job) -> float:
    """Returns CPU seconds of all ranks for a look at each, and for rank 0 to gather them."""
    usage = Usage(job.device)
    recorder = Recorder(model, moe_layers(model), device=job.device)

    def look() -> Sample:
        collectives, collectives_s = recorder.collectives()
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
            collectives=collectives,
            collectives_s=collectives_s,
            at="",
        )

    store = job.roll_call.store if job.roll_call else None
    info = job.info
    for step in range(1, 8):  # as many borders as a sample ever tells of
        recorder.borders.add(step, [10**6] * len(moe_layers(model)))
    sampler = Sampler(info.rank, info.world_size, look, recorder.borders.recent, store)
    recorder.close()
    job.all_gather(None)  # all have left a sample
    cpu_s = time.process_time()
    for _ in range(_SAMPLES):
        sampler.sample()
        if info.rank == 0:
            sampler.tell()
    return sum(job.all_gather(time.process_time() - cpu_s)) / _SAMPLES


def _to_markdown(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        plain, watched = result["plain"], result["watched"]
        row = [result["world_size"], result["batch"]]
        for name in ("wall_s", "cpu_s"):
            before, after = ([each[name] for each in side] for side in (plain, watched))
            cost = _Cost.of(before, after)
            row += [f"{statistics.median(before):.2f}", str(cost)]
        # A sample is taken each second; `busy` is how many CPUs the ranks use meanwhile.
        busy = sum(each["cpu_s"] for each in plain) / sum(each["wall_s"] for each in plain)
        sample_s = result["sample_cpu_s"]
        rows.append([*row, f"{1e3 * sample_s:.1f}", f"{cost.share + sample_s / busy:+.1%}"])
    titles = ["ranks", "prompts", "not watched, s", "watched", "not watched, CPU s", "watched"]
    titles += ["a sample, CPU ms", "CPU in all"]
    first = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\n"
        f"{first['new_tokens']} tokens are generated after prompts of {first['prompt_tokens']}, "
        "with and without the hooks of `infer.py --metrics` on the same model, one after the "
        f"other: {len(first['plain'])} pairs. Told is what the watched one of a pair takes more: "
        "the mean of the middle half of the pairs, its standard error, and that half's least and "
        "most. Seconds are the slowest rank's, CPU seconds those of all ranks together. Each "
        "second a rank also takes a sample, which goes by the store to rank 0; its CPU time, on "
        "all ranks, is in the last column too. Not counted are the lines that rank 0 adds to files."
    )


TABLE = Table(
    name="monitor",
    heading="Watching a job",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
)
