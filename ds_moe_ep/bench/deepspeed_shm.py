"""DeepSpeed's all-reduce through memory that the ranks of a host share: a peer of ours.

It is an extension in C++ that DeepSpeed builds when it is first asked for. No job of ours does.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch import Tensor

from ds_moe_ep.dist.groups import Job

__all__ = ["build", "open_all_reduce"]

_BUFFERS = Path("/dev/shm")


def build() -> None:
    """Builds the extension, in minutes, if it is not there; in one process, before ranks start."""
    ShareMemCommBuilder().load(verbose=False)


@contextmanager
def open_all_reduce(job: Job) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yields what sums a tensor over all ranks of a job on one host; all of them call it.

    Its ranks wait by looking all the time, never asleep.
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
