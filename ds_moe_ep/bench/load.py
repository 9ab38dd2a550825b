"""`bench load`: what every rank reads, holds and waits for, against reading the whole model."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from ds_moe_ep.bench.memory import PeakMemory, read_bytes_so_far
from ds_moe_ep.bench.models import SHAPES, write_model
from ds_moe_ep.bench.report import markdown_table, with_range
from ds_moe_ep.bench.table import Table
from ds_moe_ep.bench.timing import time_in_turn
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.plan import ParallelPlan

__all__ = ["TABLE"]

_MB = 1_000_000
# What a rank may hold at most: this much of what it keeps, and its interpreter.
_KEPT_FACTOR = 1.2
_INTERPRETER_BYTES = 300 * _MB


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--world", type=int, nargs="+", default=[8], help="numbers of ranks")
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["105M", "620M"])


def _prepare(args: argparse.Namespace, work: Path) -> None:
    for name in args.models:
        write_model(SHAPES[name], work / name)


def _measure(args: argparse.Namespace, job: Job, work: Path) -> list[dict[str, Any]]:
    return [_measure_model(args, job, name, work / name) for name in args.models]


def _measure_model(args: argparse.Namespace, job: Job, name: str, folder: Path) -> dict[str, Any]:
    info = job.info

    def load_own_experts() -> nn.Module:
        plan = ParallelPlan(info.world_size)
        model, _ = load_expert_parallel_model(folder, plan, ep_rank=info.rank, device=job.device)
        return model

    def load_all() -> nn.Module | None:
        if info.rank != 0:
            return None
        torch.set_num_threads(os.cpu_count() or 1)
        try:
            return AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, device_map={"": job.device}
            )
        finally:
            torch.set_num_threads(1)

    def wait_for_all() -> None:
        job.wait_for_all(args.timeout, f"loading {name}")

    # The first time, nothing is timed; it also brings the files into the page cache.
    wait_for_all()
    before = read_bytes_so_far()
    with PeakMemory() as peak:
        model = load_own_experts()
    read_bytes = read_bytes_so_far() - before
    kept_bytes = _num_bytes(model)
    del model
    seconds = time_in_turn(
        {"ours": load_own_experts, "transformers": load_all},
        args.rounds,
        wait_for_all=wait_for_all,
        slowest=lambda taken: max(job.all_gather(taken)),
    )
    ranks = job.all_gather((read_bytes / kept_bytes, kept_bytes, peak.num_bytes))
    read_factor, kept_bytes, peak_bytes = (max(values) for values in zip(*ranks, strict=True))
    file_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {
        "model": name,
        "world_size": info.world_size,
        "file_bytes": file_bytes,
        "kept_bytes": kept_bytes,
        "read_factor": read_factor,
        "peak_bytes": peak_bytes,
        "allowed_peak_bytes": int(_KEPT_FACTOR * kept_bytes + _INTERPRETER_BYTES),
        "seconds": {side: vars(spread) for side, spread in seconds.items()},
    }


def _num_bytes(model: nn.Module) -> int:
    """Bytes of what a file holds of a model: its parameters and buffers, tied ones once."""
    tensors = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.nbytes for tensor in tensors.values())


def _to_markdown(results: Sequence[dict[str, Any]]) -> str:
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


def _rounds(results: Sequence[dict[str, Any]]) -> int:
    return int(results[0]["seconds"]["ours"]["num_rounds"])


TABLE = Table(
    name="load",
    heading="Loading",
    add_arguments=_add_arguments,
    prepare=_prepare,
    measure=_measure,
    to_markdown=_to_markdown,
)
