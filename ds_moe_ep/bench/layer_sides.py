"""One MoE layer as ours and as its peers build it, all with the same weights and the same router.

A side is a function from this rank's tokens ``[T, H]`` to their outputs ``[T, H]``, router
included. Every rank of the group calls it at the same time.
"""

# Shapes: T tokens here, H hidden

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from ds_moe_ep.adapter import adapt, bind_expert_groups, moe_layers
from ds_moe_ep.bench.models import Shape
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.plan import ParallelPlan

__all__ = ["LayerSide", "autoep", "build_one_layer", "deepspeed_moe", "ours", "transformers_block"]

LayerSide = Callable[[Tensor], Tensor]


def build_one_layer(shape: Shape) -> Qwen3MoeForCausalLM:
    """Builds a model of one layer, on every rank with the same weights."""
    torch.manual_seed(0)
    config = shape.config()
    config.num_hidden_layers = 1
    config.norm_topk_prob = True  # as DeepSpeed's router does
    model = Qwen3MoeForCausalLM(config).eval()
    nn.init.orthogonal_(_block(model).gate.weight)  # see routing.py
    return model


def transformers_block(model: Qwen3MoeForCausalLM) -> LayerSide:
    """Returns the block of a whole model in this process: what all sides are compared with."""
    return _on_rows(_block(model))


def ours(
    model: Qwen3MoeForCausalLM, job: Job, dispatcher: str, num_tokens: Callable[[], list[int]]
) -> LayerSide:
    """Returns the block with its experts spread over all ranks.

    Args:
        model: The whole model, which is left as it is.
        job: The job.
        dispatcher: Name of the dispatcher.
        num_tokens: Tells the tokens of every rank, which a pass of infer.py announces once for all
            layers.
    """
    model = copy.deepcopy(model).to(job.device)
    adapt(model, ParallelPlan(job.info.world_size), ep_rank=job.info.rank, dispatcher=dispatcher)
    bind_expert_groups(model, device=job.device)
    (layer,) = moe_layers(model)
    block = _on_rows(_block(model))

    def run(x_TH: Tensor) -> Tensor:
        layer.deepspeed_moe.announce(num_tokens())
        return block(x_TH)

    return run


def deepspeed_moe(model: Qwen3MoeForCausalLM, job: Job) -> LayerSide:
    """Returns ``deepspeed.moe.layer.MoE`` with every token kept."""
    config, block = model.config, _block(model)
    layer = MoE(
        config.hidden_size,
        Qwen3MoeMLP(config, intermediate_size=config.moe_intermediate_size),
        num_experts=config.num_experts,
        ep_size=job.info.world_size,
        k=config.num_experts_per_tok,
        drop_tokens=False,
    )
    gate_up, down = block.experts.gate_up_proj, block.experts.down_proj
    num_local = config.num_experts // job.info.world_size
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.weight.copy_(block.gate.weight)
        for local, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            weights = gate_up[job.info.rank * num_local + local]
            expert.gate_proj.weight.copy_(weights[: len(weights) // 2])
            expert.up_proj.weight.copy_(weights[len(weights) // 2 :])
            expert.down_proj.weight.copy_(down[job.info.rank * num_local + local])
    layer.to(job.device).eval().set_deepspeed_parallelism()

    def run(x_TH: Tensor) -> Tensor:
        return cast(Tensor, layer(x_TH)[0])

    return run


def autoep(model: Qwen3MoeForCausalLM, job: Job) -> LayerSide:
    """Returns the layer that DeepSpeed's AutoEP puts in place of the block.

    The layer alone: replacing it in a whole model fails with the transformers of today.
    """
    model = copy.deepcopy(model).to(job.device)
    settings = parse_autoep_config({"enabled": True, "autoep_size": job.info.world_size})
    (spec,) = AutoEP(model, settings).ep_parser()
    layer = AutoEPMoELayer(spec, _block(model), job.info.world_size, job.info.rank, settings).eval()
    layer.set_deepspeed_parallelism()

    def run(x_TH: Tensor) -> Tensor:
        output = layer(x_TH[None])
        return cast(Tensor, output[0] if isinstance(output, tuple) else output).view_as(x_TH)

    return run


def _block(model: Qwen3MoeForCausalLM) -> nn.Module:
    return cast(nn.Module, model.model.layers[0].mlp)


def _on_rows(block: nn.Module) -> LayerSide:
    def run(x_TH: Tensor) -> Tensor:
        output = block(x_TH[None])
        return cast(Tensor, output[0] if isinstance(output, tuple) else output).view_as(x_TH)

    return run
