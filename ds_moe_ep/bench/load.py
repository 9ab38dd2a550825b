"""`bench load`: what every rank reads, holds and waits for, against reading the whole model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ds_moe_ep.bench.memory import PeakMemory, read_bytes_so_far
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.bench.timing import time_in_turn
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.local_machine import num_usable_cores
from ds_moe_ep.plan import ParallelPlan

__all__ = ["TABLE"]

_MB = 1_000_000
# What a rank may hold at most: this much of what it keeps, and its interpreter.
_KEPT_FACTOR = 1.2
_INTERPRETER_BYTES = 300 * _MB


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[8], help="numbers of ranks")
    parser.add_argument(
        "--models", nargs="+", choices=SHAPES, default=["105M", "620M"], help="models to load"
    )


def _prepare(args: argparse.Namespace, work: Path) -> None:
    for name in args.models:
        write_model(SHAPES[name], work / name)


def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[Result]:
    # Memory first: what a whole model leaves behind in rank 0 would count as its own.
    memory = {name: _measure_memory(args, job, work / name) for name in args.models}
    return [
        {"model": name, **memory[name], "seconds": _time(args, job, work / name)}
        for name in args.models
    ]


def _measure_memory(args: argparse.Namespace, job: Job, folder: Path) -> Result:
    job.wait_for_all(args.timeout, "loading")
    before = read_bytes_so_far()
    with PeakMemory() as peak:
        model = _load_own_experts(job, folder)
    read_bytes = read_bytes_so_far() - before
    kept_bytes = _num_bytes(model)
    ranks = job.all_gather((read_bytes / kept_bytes, kept_bytes, peak.num_bytes))
    read_factor, kept_bytes, peak_bytes = (max(values) for values in zip(*ranks, strict=True))
    return {
        "world_size": job.info.world_size,
        "file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")),
        "kept_bytes": kept_bytes,
        "read_factor": read_factor,
        "peak_bytes": peak_bytes,
        "allowed_peak_bytes": int(_KEPT_FACTOR * kept_bytes + _INTERPRETER_BYTES),
    }


def _time(args: argparse.Namespace, job: Job, folder: Path) -> dict[str, dict[str, float]]:
    def load_all() -> nn.Module | None:
        if job.info.rank != 0:
            return None
        torch.set_num_threads(num_usable_cores())
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map={"": job.device}
            )
        finally:
            torch.set_num_threads(1)

    load_all()  # a first time, as ours was when its memory was measured
    seconds = time_in_turn(
        {"ours": lambda: _load_own_experts(job, folder), "transformers": load_all},
        args.rounds,
        wait_for_all=lambda: job.wait_for_all(args.timeout, "loading"),
        slowest=lambda taken: max(job.all_gather(taken)),
    )
    return {side: vars(spread) for side, spread in seconds.items()}


def _load_own_experts(job: Job, folder: Path) -> nn.Module:
    info = job.info
    model, _ = load_expert_parallel_model(
        folder, ParallelPlan(info.world_size), ep_rank=info.rank, device=job.device
    )
    return model


def _num_bytes(model: nn.Module) -> int:
    """Bytes of what a file holds of a model: its parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _to_markdown(results: Sequence[Result]) -> str:
    titles = [
        "model",
        "ranks",
        "files, MB",
        "kept a rank, MB",
        "read / kept (bar 1.05)",
        "peak, MB (bar)",
        "all ranks loaded, s",
        "whole model by transformers, s",
        "transformers / ours (bar 1.0)",
    ]
    rows = []
    for result in results:
        ours, theirs = (result["seconds"][side] for side in ("ours", "transformers"))
        rows.append(
            [
                result["model"],
                result["world_size"],
                f"{result['file_bytes'] / _MB:,.0f}",
                f"{result['kept_bytes'] / _MB:,.0f}",
                f"{result['read_factor']:.3f}",
                f"{result['peak_bytes'] / _MB:,.0f} ({result['allowed_peak_bytes'] / _MB:,.0f})",
                with_range(ours),
                with_range(theirs),
                f"{theirs['median'] / ours['median']:.2f}",
            ]
        )
    return (
        f"{markdown_table(titles, rows)}\n\n"
        "Each rank builds the model and reads its dense weights and its own experts; the peer is "
        "one process that calls `from_pretrained` for the whole model with a thread a core while "
        f"the ranks wait. Seconds are the median (least to most) of {_rounds(results)} rounds, the "
        "slowest rank's, files in the page cache. The peak is the most of any rank, its "
        "proportional set size with Python and all libraries; its bar is 1.2 times what it keeps "
        "+ 300 MB."
    )


def _rounds(results: Sequence[Result]) -> int:
    return int(results[0]["seconds"]["ours"]["num_rounds"])


TABLE = Table(
    name="load",
    heading="Loading",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
)
