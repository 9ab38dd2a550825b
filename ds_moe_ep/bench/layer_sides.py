"""One MoE layer as ours and as its peers build it, all with the same weights and the same router.

A side is a function from this rank's tokens ``[T, H]`` to their outputs ``[T, H]``, router
included. Every rank of the group calls it at the same time.
"""

# Shapes: T tokens here, H hidden

from __future__ import annotations

import argparse
import copy
import functools
import importlib
from collections.abc import Callable, Mapping
from typing import cast

import torch
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE
from torch import Tensor, nn
from transformers import Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeMLP

from ds_moe_ep.adapter import adapt, bind_expert_groups, moe_layers, prepare_for_inference
from ds_moe_ep.bench.models import SHAPES, Shape
from ds_moe_ep.bench.timing import Spread, time_in_turn
from ds_moe_ep.dist.comm_stats import CommStats
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "LayerSide",
    "OurLayer",
    "add_shape_argument",
    "autoep",
    "build_one_layer",
    "check_equal",
    "deepspeed_moe",
    "on_rows",
    "time_sides",
    "transformers_block",
    "tutel",
]

LayerSide = Callable[[Tensor], Tensor]

# Calls are repeated until a round of the quickest side takes this long: one call of a few
# milliseconds tells more about the machine's other work than about the side.
_ROUND_S = 0.1
_MOST_CALLS = 64


def add_shape_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --shape, as all tables of one layer have it."""
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="105M",
        help="model of which a layer is measured (default: %(default)s)",
    )


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
    return on_rows(_block(model))


class OurLayer:
    """The block with its experts spread over all ranks, as infer.py runs it.

    Args:
        model: The whole model, which is left as it is.
        job: The job.
        dispatcher: Name of the dispatcher.
        num_tokens: Tells the tokens of every rank, which a pass of infer.py announces once for all
            layers; None where nothing is announced.
        placement: Experts in slots; by default they are contiguous.
    """

    def __init__(
        self,
        model: Qwen3MoeForCausalLM,
        job: Job,
        dispatcher: str,
        num_tokens: Callable[[], list[int] | None],
        placement: SlotPlacement | None = None,
    ) -> None:
        model = copy.deepcopy(model).to(job.device)
        plan = ParallelPlan(job.info.world_size)
        adapt(model, plan, ep_rank=job.info.rank, dispatcher=dispatcher, placement=placement)
        bind_expert_groups(model, nodes=job.nodes, device=job.device)
        prepare_for_inference(model)
        (self._layer,) = moe_layers(model)
        self._block = on_rows(_block(model))
        self._num_tokens = num_tokens

    @property
    def stats(self) -> CommStats:
        """What this rank's collectives cost so far."""
        return self._layer.deepspeed_moe.stats

    def take_choices(self) -> list[str]:
        """Returns what ``auto`` has chosen since it was asked last; nothing of another one."""
        dispatcher = self._layer.deepspeed_moe.dispatcher
        if not isinstance(dispatcher, Auto):
            return []
        names = sorted(dispatcher.calls)
        dispatcher.calls.clear()
        return names

    def num_rows_computed(self) -> int:
        """Returns the rows that this rank's experts have computed so far."""
        return int(self._layer.deepspeed_moe.tokens_per_expert.sum())

    def __call__(self, x_TH: Tensor) -> Tensor:
        """Returns the outputs of this rank's tokens."""
        self._layer.announce(self._num_tokens())
        return self._block(x_TH)


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
        top2_2nd_expert_sampling=False,  # with k=2 it would draw the second expert by chance
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
    return on_rows(layer)


def tutel(model: Qwen3MoeForCausalLM, job: Job) -> LayerSide:
    """Returns Tutel's layer with its own SwiGLU experts, and room for every token.

    Tutel is not on the package index: it is built from its repository.
    """
    moe = importlib.import_module("tutel.moe")
    config, block = model.config, _block(model)
    num_local = config.num_experts // job.info.world_size
    layer = moe.moe_layer(
        gate_type={"type": "top", "k": config.num_experts_per_tok, "capacity_factor": 0.0},
        model_dim=config.hidden_size,
        experts={
            "type": "llama_ffn",
            "num_experts_per_device": num_local,
            "hidden_size_per_expert": config.moe_intermediate_size,
        },
    )
    own = slice(job.info.rank * num_local, (job.info.rank + 1) * num_local)
    gate, up = block.experts.gate_up_proj[own].chunk(2, dim=1)
    with torch.no_grad():
        layer.gates[0].wg.weight.copy_(block.gate.weight)
        experts = layer.experts
        weights = (gate, up, block.experts.down_proj[own])
        for param, weight in zip(
            (experts.W_fc1, experts.W_fc2, experts.W_fc3), weights, strict=True
        ):
            param.copy_(weight.transpose(1, 2).flatten())
    return cast(LayerSide, layer.to(job.device).eval())


def check_equal(job: Job, name: str, actual_TH: Tensor, expected_TH: Tensor) -> None:
    """Refuses to time a side that computes something else; all ranks call it.

    Raises:
        DistributedError: On every rank, if the outputs differ on any.
    """
    error = (actual_TH.cpu() - expected_TH).abs()
    worst = max(job.all_gather(error.max().item() if error.numel() else 0.0))
    if not worst < 1e-4:
        raise DistributedError(f"{name} differs from transformers by {worst:g}: not timed.")


def time_sides(
    job: Job,
    sides: Mapping[str, LayerSide],
    x_TH: Tensor,
    *,
    rounds: int,
    timeout_s: float,
    most_calls: int = _MOST_CALLS,
) -> dict[str, Spread]:
    """Times one call of each side, in turn; all ranks call it.

    Args:
        job: The job.
        sides: What to time, by name.
        x_TH: Tokens of this rank.
        rounds: How often.
        timeout_s: How long a rank waits for another.
        most_calls: Calls of a round, at most.

    Returns:
        Seconds of the slowest rank.
    """
    x_TH = x_TH.to(job.device)

    def repeat(side: LayerSide, num_calls: int) -> None:
        for _ in range(num_calls):
            side(x_TH)
        if job.device.type == "cuda":
            torch.cuda.synchronize(job.device)

    def time_calls(num_calls: int, num_rounds: int) -> dict[str, Spread]:
        return time_in_turn(
            {name: functools.partial(repeat, side, num_calls) for name, side in sides.items()},
            num_rounds,
            wait_for_all=lambda: job.wait_for_all(timeout_s, "a round of timing"),
            slowest=lambda taken: max(job.all_gather(taken)) / num_calls,
        )

    quickest_s = min(spread.min for spread in time_calls(1, num_rounds=2).values())
    return time_calls(max(1, min(most_calls, round(_ROUND_S / quickest_s))), rounds)


def _block(model: Qwen3MoeForCausalLM) -> nn.Module:
    return cast(nn.Module, model.model.layers[0].mlp)


def on_rows(block: nn.Module) -> LayerSide:
    """Returns a block of a transformers model, which takes batches, as a function of tokens."""

    def run(x_TH: Tensor) -> Tensor:
        output = block(x_TH[None])
        return cast(Tensor, output[0] if isinstance(output, tuple) else output).view_as(x_TH)

    return run
