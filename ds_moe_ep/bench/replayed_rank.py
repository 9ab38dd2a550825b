"""One rank of a job whose other ranks are not there, in torch's ``fake`` process group.

From each of them it gets what it sends there. So shapes and kernels are those of the job, the
results are not. Weights are random, and tokens choose all experts equally.
"""

# Shapes: T tokens of this rank, H hidden, K top_k, W ranks, S rows sent, R = W * T, C columns

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from ds_moe_ep.adapter import adapt, moe_layers, shard_experts
from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config
from ds_moe_ep.dist.collectives import Communicator, Meanwhile
from ds_moe_ep.dist.groups import Job, RankInfo
from ds_moe_ep.moe.dispatch import Links, make_dispatcher
from ds_moe_ep.moe.layer import ExpertParallelMoE
from ds_moe_ep.plan import ParallelPlan

__all__ = ["announce", "build_own_part", "even_ids", "join_fake_job"]


def join_fake_job(rank: int, world_size: int) -> Job:
    """Makes this process one rank of a job, on the first GPU if there is one."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Job(RankInfo(rank, 0, world_size), device, dist.group.WORLD)


def build_own_part(folder: str, job: Job, dtype: torch.dtype, dispatcher: str) -> PreTrainedModel:
    """Builds this rank's part of a model, with random weights; the rest is never there."""
    torch.manual_seed(0)
    rank, plan = job.info.rank, ParallelPlan(job.info.world_size)
    model = build_on_meta(read_model_config(Path(folder)), dtype)
    shard_experts(model, plan.ep_size, rank)
    model.to_empty(device=job.device).init_weights()
    adapt(model, plan, ep_rank=rank, dispatcher=dispatcher)
    links = Links(_Mirror(dist.group.WORLD))
    for layer in moe_layers(model):
        # The expert group is the world; DeepSpeed's groups would need other ranks to be made.
        layer.deepspeed_moe._set_ep_group(dist.group.WORLD)
        layer.deepspeed_moe.dispatcher = make_dispatcher(dispatcher, links, layer.num_local_experts)
        layer.register_forward_pre_hook(_route_evenly)
    return model.eval()


class _Mirror(Communicator):
    """Collectives that give back what is sent: in one copy, which no compiler takes apart.

    All ranks have as many tokens, and send each other as many rows. The fake group's own are of no
    use here: its gathering is a copy for each rank, and older ones leave memory as they find it.
    """

    def exchange(
        self,
        rows_SC: Tensor,
        send: Sequence[int],
        recv: Sequence[int],
        meanwhile: Meanwhile | None = None,
        *,
        kind: str = "exchange",
    ) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return _copy(rows_SC, 1)

    def gather(
        self, rows_TC: Tensor, counts: Sequence[int], meanwhile: Meanwhile | None = None
    ) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return _copy(rows_TC, self.size)

    def reduce(
        self, partial_RC: Tensor, counts: Sequence[int], meanwhile: Meanwhile | None = None
    ) -> Tensor:
        if meanwhile is not None:
            meanwhile()
        return _copy(partial_RC[: counts[self.rank]], 1)


@torch.library.custom_op(
    "ds_moe_ep::copy_rows", mutates_args=(), schema="(Tensor rows, int times) -> Tensor"
)
def _copy(rows: Tensor, times: int) -> Tensor:
    """Copies rows so many times, one copy behind the other."""
    words = rows.contiguous().view(torch.int32)  # bytes alone would be slow
    return words.repeat(times, 1).view(rows.dtype)


@_copy.register_fake
def _shape_of_copy(rows: Tensor, times: int) -> Tensor:
    return rows.new_empty(rows.shape[0] * times, rows.shape[1])


def _route_evenly(
    layer: ExpertParallelMoE, args: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives every expert as many rows: with random weights, a rank might get none."""
    x_TH, topk_ids_TK, weights_TK = args
    return (
        x_TH,
        even_ids(*topk_ids_TK.shape, layer.ep_size, layer.num_experts, x_TH.device),
        weights_TK,
    )


@functools.cache  # a step is to be timed without it
def even_ids(
    num_tokens: int, top_k: int, ep_size: int, num_experts: int, device: torch.device
) -> Tensor:
    """Returns expert ids ``[T, K]`` that go round the ranks, and on each round its experts."""
    slots_TK = torch.arange(num_tokens * top_k, device=device).view(num_tokens, top_k)
    num_local_experts = num_experts // ep_size
    return slots_TK % ep_size * num_local_experts + slots_TK // ep_size % num_local_experts


def announce(model: PreTrainedModel, num_tokens: int, world_size: int) -> None:
    """Tells all layers that every rank of the job brings so many tokens."""
    for layer in moe_layers(model):
        layer.announce([num_tokens] * world_size)
