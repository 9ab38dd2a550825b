"""`bench e2e` and `bench uneven`: a whole model, against transformers alone and in EP.

The one has prompts of one length, the other of many, as users have.
"""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ds_moe_ep import heap
from ds_moe_ep.bench.floors import wait
from ds_moe_ep.bench.generate_sides import (
    PAD,
    GenerateSide,
    add_batch_arguments,
    check_batches,
    load_ours,
    one_process,
    transformers_ep,
)
from ds_moe_ep.bench.memory import PeakMemory
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.errors import ConfigError, DistributedError

__all__ = ["TABLE", "UNEVEN"]

_OURS = "ours"
_PEERS = ("transformers EP", "one process, grouped_mm", "one process, eager")


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_batch_arguments(parser, world=[2, 4, 8], new_tokens=8)
    parser.add_argument(
        "--prompt-tokens", type=int, default=32, help="tokens of the longest prompt"
    )
    parser.add_argument(
        "--least-tokens", type=int, help="tokens of the shortest (default: the same)"
    )
    parser.add_argument(
        "--dispatcher", default="auto", help="as for launch/infer.py (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of the weights (default: %(default)s)",
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="as for launch/infer.py")


def _add_uneven_arguments(parser: argparse.ArgumentParser) -> None:
    _add_arguments(parser)
    parser.set_defaults(world=[2, 4], batch=[32], prompt_tokens=128, least_tokens=8)


def _prepare(args: argparse.Namespace, work: Path) -> None:
    if args.cuda_graphs and len(args.batch) > 1:
        raise ConfigError(
            f"--cuda-graphs captures passes of one size, but --batch has {len(args.batch)}. Give "
            "one, as --batch 16."
        )
    check_batches(args.batch, args.world)
    write_model(SHAPES[args.model], work / args.model)


@torch.no_grad()
def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    folder, dtype = work / args.model, getattr(torch, args.dtype)
    captured = None
    if args.cuda_graphs:
        shares = 1 if args.dispatcher == "allreduce" else job.info.world_size
        captured = args.batch[0] // shares, args.prompt_tokens + 1 + args.new_tokens
    build: dict[str, Callable[[], GenerateSide]] = {
        _OURS: lambda: load_ours(folder, job, args.dispatcher, dtype, captured=captured)[1],
        _PEERS[0]: lambda: transformers_ep(folder, job, dtype),
        _PEERS[1]: lambda: one_process(folder, job, "grouped_mm", dtype),
        _PEERS[2]: lambda: one_process(folder, job, "eager", dtype),
    }
    if job.info.world_size == 1:  # nothing to spread
        del build[_PEERS[0]]
    prompts_BS = _prompts(args, max(args.batch))
    sides, peak_bytes = {}, {}
    for name in build:
        sides[name], peak_bytes[name] = _build(build[name], job, prompts_BS, args.new_tokens)
    return [
        {**_measure_batch(args, job, sides, batch), "peak_bytes": peak_bytes}
        for batch in args.batch
    ]


def _build(
    build: Callable[[], GenerateSide], job: Job, prompts_BS: Tensor, num_new: int
) -> tuple[GenerateSide, list[int]]:
    """Loads a side's model and generates with it once.

    Returns:
        The side, and what each rank's process, or its tensors on a GPU, have grown by at most.
    """
    heap.release_freed_memory()
    on_gpu = job.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(job.device)
    before_bytes = torch.cuda.memory_allocated(job.device) if on_gpu else PeakMemory.now()
    with PeakMemory() as peak:
        side = build()
        side(prompts_BS, num_new)
    peak_bytes = torch.cuda.max_memory_allocated(job.device) if on_gpu else peak.num_bytes
    return side, job.all_gather(peak_bytes - before_bytes)


def _prompts(args: argparse.Namespace, batch: int) -> Tensor:
    """Returns prompts whose lengths, on a scale of doublings, are spread from least to most."""
    generator = torch.Generator().manual_seed(batch)
    vocabulary, most = SHAPES[args.model].vocab_size, args.prompt_tokens
    prompts_BS = torch.randint(3, vocabulary, (batch, most), generator=generator)
    least = args.least_tokens or most
    spread_B = torch.linspace(0, 1, batch)[torch.randperm(batch, generator=generator)]
    lengths_B = (least * (most / least) ** spread_B).round().long()
    is_padding_BS = torch.arange(most) < (most - lengths_B)[:, None]
    return prompts_BS.masked_fill(is_padding_BS, PAD)


def _measure_batch(
    args: argparse.Namespace, job: Job, sides: dict[str, GenerateSide], batch: int
) -> Result:
    prompts_BS = _prompts(args, batch)
    equal_share = _share_of_equal_tokens(job, sides, prompts_BS, args.new_tokens)
    if args.dtype == "float32" and (others := [n for n, part in equal_share.items() if part < 1]):
        raise DistributedError(f"other tokens than eager transformers': {', '.join(others)}.")

    def run(side: GenerateSide, num_new: int) -> None:
        side(prompts_BS, num_new)
        wait(job.device)

    def seconds(num_new: int) -> dict[str, dict[str, float]]:
        found = time_in_turn(
            {name: functools.partial(run, side, num_new) for name, side in sides.items()},
            args.rounds,
            wait_for_all=lambda: job.wait_for_all(args.timeout, "generating"),
            slowest=lambda taken: max(job.all_gather(taken)),
        )
        return {name: vars(spread) for name, spread in found.items()}

    return {
        "world_size": job.info.world_size,
        "batch": batch,
        "prompt_tokens": args.prompt_tokens,
        "all_prompt_tokens": int((prompts_BS != PAD).sum()),
        "new_tokens": args.new_tokens,
        "dtype": args.dtype,
        "dispatcher": args.dispatcher,
        "equal_share": equal_share,
        "prefill_s": seconds(1),
        "all_s": seconds(1 + args.new_tokens),
    }


def _share_of_equal_tokens(
    job: Job, sides: dict[str, GenerateSide], prompts_BS: Tensor, num_new: int
) -> dict[str, float]:
    """Returns how many of a side's new tokens are those of eager transformers, of 1."""
    found = {}
    for name, side in sides.items():
        completed = side(prompts_BS, num_new)
        parts = [part for part in job.all_gather(completed) if part is not None]
        found[name] = torch.cat([part.cpu() for part in parts])[:, prompts_BS.shape[1] :]
    reference = found[_PEERS[2]]
    return {name: float((new == reference).float().mean()) for name, new in found.items()}


def _to_markdown(results: Sequence[Result]) -> str:
    peers = [peer for peer in _PEERS if any(peer in result["all_s"] for result in results)]
    names = [_OURS, *peers]
    titles = ["ranks", "prompts", "phase", *(f"{name}, tokens/s" for name in names)]
    titles += [f"ours / {peer}" for peer in peers]
    rows = []
    for result in results:
        tokens = {
            "prefill": result["all_prompt_tokens"],
            "decode": result["batch"] * result["new_tokens"],
        }
        for phase, num_tokens in tokens.items():
            seconds = {name: _seconds(result, name, phase) for name in result["all_s"]}
            ours_s = seconds[_OURS].median
            row = [result["world_size"], result["batch"], phase]
            row += [_rate(num_tokens, seconds[n]) if n in seconds else "-" for n in names]
            row += [f"{seconds[p].median / ours_s:.2f}" if p in seconds else "-" for p in peers]
            rows.append(row)
    first = [
        [
            *(r["world_size"], r["batch"]),
            *(with_range(r["prefill_s"][n]) if n in r["prefill_s"] else "-" for n in names),
        ]
        for r in results
    ]
    of_world = {r["world_size"]: r["peak_bytes"] for r in results}
    memory = [
        [size, *(_in_all_and_most(peak[n]) if n in peak else "-" for n in names)]
        for size, peak in of_world.items()
    ]
    sizes = results[0]
    return (
        f"{markdown_table(titles, rows)}\n\nTime to the first token, s:\n\n"
        f"{markdown_table(['ranks', 'prompts', *names], first)}\n\n"
        "Peak memory of all ranks together (of the rank with most), MB:\n\n"
        f"{markdown_table(['ranks', *names], memory)}\n\n"
        f"Greedy generation in {sizes['dtype']} with {_lengths(sizes)} tokens a prompt and "
        f"{sizes['new_tokens']} new ones; {_equality(results)}. Ranks have one thread each and "
        f"share the prompts{_REPLICATED if sizes['dispatcher'] == 'allreduce' else ''}; one "
        "process has a thread a core "
        "and all prompts, while the ranks wait. Rates are of the median time (least to most) of "
        f"{sizes['prefill_s'][_OURS]['num_rounds']} rounds. Prefill is the time to the first "
        "token. Decode is that of the tokens after it, the time of all tokens less that of the "
        "first, which are timed apart: a difference of medians, and the range is the widest that "
        "both ranges allow. "
        "Memory is what loading the model and generating for most prompts add to a process, by "
        "its proportional set size: weights, caches, temporary tensors; not Python and "
        "libraries. Of a GPU's it is what torch's allocator gave out."
    )


_REPLICATED = (
    ", but of ours each does them all, and only experts are shared, by the allreduce dispatcher"
)


def _equality(results: Sequence[Result]) -> str:
    """Says how the sides' tokens compare; a float32 run ends where they differ."""
    least = min(share for result in results for share in result["equal_share"].values())
    if least == 1.0:
        return "all sides give the same tokens (checked before each row)"
    return (
        "random weights give nearly equal scores, between which roundings decide: of a side's new "
        f"tokens at least {least:.0%} are those of eager transformers"
    )


def _lengths(result: Result) -> str:
    most, mean = result["prompt_tokens"], result["all_prompt_tokens"] / result["batch"]
    return f"{most}" if mean == most else f"up to {most} and {mean:.0f} on the mean"


def _in_all_and_most(peak_bytes: Sequence[int]) -> str:
    return f"{sum(peak_bytes) / 1e6:,.0f} ({max(peak_bytes) / 1e6:,.0f})"


def _seconds(result: Result, name: str, phase: str) -> Spread:
    first = Spread(**result["prefill_s"][name])
    if phase == "prefill":
        return first
    all_ = Spread(**result["all_s"][name])
    return Spread(
        all_.median - first.median, all_.min - first.max, all_.max - first.min, all_.num_rounds
    )


def _rate(num_tokens: int, seconds: Spread) -> str:
    """Returns tokens/s with their range; nothing bounds them where the least time is not known."""
    most = num_tokens / seconds.min if seconds.min > 0 else math.inf
    return f"{num_tokens / seconds.median:,.0f} ({num_tokens / seconds.max:,.0f} to {most:,.0f})"


def _variant(args: argparse.Namespace) -> tuple[str, str] | None:
    if args.cuda_graphs:
        return "graphs", "decode passes replayed on our side"
    if args.world == [1]:
        return "one-rank", "on one rank"
    if args.dispatcher == "allreduce":
        return "replicated", "the batch replicated on our side"
    return None


TABLE = Table(
    name="e2e",
    heading="Generation, end to end",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
    variant=_variant,
)

UNEVEN = replace(
    TABLE,
    name="uneven",
    heading="Generation from prompts of many lengths",
    add_arguments=_add_uneven_arguments,
)
