"""DeepSpeed's all-reduce through memory that the ranks of a host share: a peer of ours.

It is an extension in C++ that DeepSpeed builds when it is first asked for. No job of ours does.
"""

# Shapes: T tokens, the same on every rank, H hidden

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch import Tensor
from transformers import Qwen3MoeForCausalLM

from ds_moe_ep.bench.layer_sides import (
    OurLayer,
    build_one_layer,
    check_equal,
    time_sides,
    transformers_block,
)
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.table import Result
from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.moe.allreduce import AllReduce

__all__ = ["DEEPSPEED", "OURS", "build", "open_all_reduce", "time_layers"]

OURS, DEEPSPEED = "shared memory", "DeepSpeed's shared memory"

_BUFFERS = Path("/dev/shm")
_TOKENS = (1, 16, 64)

SumOverRanks = Callable[[Tensor], Tensor]


def build() -> None:
    """Builds the extension, in minutes, if it is not there; in one process, before ranks start."""
    ShareMemCommBuilder().load(verbose=False)


@contextmanager
def open_all_reduce(job: Job) -> Iterator[SumOverRanks]:
    """Yields what sums a tensor over all ranks of a job on one host; all of them call it.

    Its ranks wait by looking all the time, never asleep, and for ever.
    """
    extension = ShareMemCommBuilder().load(verbose=False)
    extension.initialize(job.info.world_size, job.info.rank)

    def all_reduce(tensor: Tensor) -> Tensor:
        sum_ = tensor.clone()
        torch.ops.deepspeed.inference_all_reduce_(sum_)
        return sum_

    try:
        yield all_reduce
    finally:
        where = f"{os.environ['MASTER_ADDR']}_{os.environ['MASTER_PORT']}"
        for buffer in _BUFFERS.glob(f"deepspeed_allreduce_buffer_*_{where}_{job.info.rank}"):
            buffer.unlink()  # else it stays in memory for ever


def time_layers(
    job: Job, all_reduce: SumOverRanks, *, rounds: int, timeout_s: float
) -> list[Result]:
    """Times an MoE layer of a replicated batch with our sums and with DeepSpeed's, in turn.

    Args:
        job: A job on one host.
        all_reduce: What `open_all_reduce` yields.
        rounds: How often.
        timeout_s: How long a rank waits for another.
    """
    model = build_one_layer(SHAPES["105M"])
    reference = transformers_block(model)
    ours = OurLayer(model, job, "allreduce", lambda: None)
    sides = {OURS: ours, DEEPSPEED: _LayerWithItsSums(model, job, all_reduce)}
    results = []
    for num_tokens in _TOKENS:
        generator = torch.Generator().manual_seed(num_tokens)
        x_TH = torch.randn(num_tokens, model.config.hidden_size, generator=generator)
        for name, side in sides.items():
            check_equal(job, name, side(x_TH), reference(x_TH))
        seconds = time_sides(job, sides, x_TH, rounds=rounds, timeout_s=timeout_s)
        spreads = {name: vars(spread) for name, spread in seconds.items()}
        results.append({"num_tokens": num_tokens, "seconds": spreads})
    return results


class _LayerWithItsSums(OurLayer):
    """Our layer, but for what sums the outputs of all ranks."""

    def __init__(self, model: Qwen3MoeForCausalLM, job: Job, all_reduce: SumOverRanks) -> None:
        super().__init__(model, job, "allreduce", lambda: None)
        experts = self._layer.deepspeed_moe
        comm = _ItsSums(experts.ep_group, experts.stats)
        comm.all_reduce = all_reduce
        experts.dispatcher = AllReduce(comm, experts.experts.num_experts)


class _ItsSums(Communicator):
    all_reduce: SumOverRanks

    def sum(self, partial_TC: Tensor, meanwhile: Meanwhile | None = None) -> Tensor:
        with self._timed("sum", partial_TC, (self.size - 1) * partial_TC.shape[0]):
            return self.all_reduce(partial_TC)
