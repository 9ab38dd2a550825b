"""One rank of a job whose other ranks are not there: torch's ``fake`` process group plays them.

Each of them sends this rank what it sends to rank 0. So shapes and kernels are those of the job,
the results are not. Weights are random, and tokens choose all experts equally.
"""

# Shapes: T tokens of this rank, H hidden, K top_k

from __future__ import annotations

import functools
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import PreTrainedModel

from ds_moe_ep.adapter import adapt, moe_layers, shard_experts
from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config
from ds_moe_ep.dist.groups import Job, RankInfo
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
    for layer in moe_layers(model):
        # The expert group is the world; DeepSpeed's groups would need other ranks to be made.
        layer.deepspeed_moe._set_ep_group(dist.group.WORLD)
        layer.register_forward_pre_hook(_route_evenly)
    return model.eval()


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
