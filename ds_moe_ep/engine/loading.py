"""Loads a rank's part of the model, binds its groups and hands it to DeepSpeed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import deepspeed
from torch import nn

from ds_moe_ep.adapter import AdaptReport, bind_expert_groups, moe_layers, prepare_for_inference
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import Job, create_expert_groups
from ds_moe_ep.engine.checksums import check_share
from ds_moe_ep.engine.console import only_rank_0_prints
from ds_moe_ep.engine.decoding import warn_of_ignored
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.prepare import Work
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = ["Engine", "init_inference", "load_engine"]


@dataclass(frozen=True)
class Engine:
    """A loaded model, ready to run on this rank.

    Attributes:
        deepspeed_engine: What ``deepspeed.init_inference`` returned.
        layers: Its MoE layers, in the order of a forward pass.
        report: What was swapped, and which experts this rank holds.
        load_s: Seconds from the start of loading.
    """

    deepspeed_engine: Any
    layers: list[ExpertParallelMoE]
    report: AdaptReport
    load_s: float


def load_engine(options: JobOptions, job: Job, work: Work) -> Engine:
    """Loads this rank's weights; all ranks call it, and go on together or fail together.

    Raises:
        DsMoeEpError: A rank cannot load.
    """
    start = time.perf_counter()
    create_expert_groups(work.plan.ep_size)

    dispatcher = options.dispatcher
    if dispatcher == "auto" and options.batch_mode == "replicated":
        dispatcher = "allreduce"

    def load() -> tuple[nn.Module, AdaptReport]:
        check_share(options.model, job.info.rank, job.info.world_size)
        model, report = load_expert_parallel_model(
            options.model,
            work.plan,
            ep_rank=work.plan.coordinates(job.info.rank).ep_rank,
            dtype=work.dtype,
            device=job.device,
            dispatcher=dispatcher,
            placement=work.placement,
        )
        if job.info.rank == 0:
            print(f"{report}; weights in {work.dtype}", flush=True)
            if options.task == "generate":
                warn_of_ignored(model.generation_config)
        return model, report

    model, report = job.all_or_none(load, what="loading weights", timeout_s=options.start_timeout_s)
    with only_rank_0_prints(job.info.rank):
        bind_expert_groups(model, nodes=job.nodes, device=job.device, timeout_s=options.timeout_s)
        engine = init_inference(model, work.deepspeed_config)
    return Engine(engine, moe_layers(model), report, time.perf_counter() - start)


def init_inference(model: nn.Module, config: dict[str, Any]) -> Any:
    """Calls ``deepspeed.init_inference``, and undoes the one thing it does too much.

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
    prepare_for_inference(model)
    for name, tensor in kept.items():
        holder_name, _, attribute = name.rpartition(".")
        getattr(model.get_submodule(holder_name), attribute).data = tensor
    return engine
