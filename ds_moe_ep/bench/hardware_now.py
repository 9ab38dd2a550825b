"""Measures what predictions start from, on all ranks at once, so that what they share is shared.

The rates of products and of reading weights; what a pass costs that has next to nothing to compute.
"""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import mean, median

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.bench.floors import wait
from ds_moe_ep.bench.generate_sides import complete
from ds_moe_ep.bench.models import SHAPES, Shape
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.host_memory import available_bytes
from ds_moe_ep.local_machine import num_usable_cores
from ds_moe_ep.moe.cost_model import LinkPrices
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.hardware import Device, Launches

__all__ = ["HardwareNow"]

# Each thing is repeated for so long, while all other ranks do the same; and for so long by a rank
# itself, where ranks take turns on a core.
_WINDOW_S, _OWN_S = 0.3, 0.1
_MANY_ROWS = 256
# More than the caches keep: of a rank, and of all ranks that share them.
_READ_BYTES, _ALL_READ_BYTES = 4 << 20, 128 << 20
_FEW, _MANY, _NEW = 2, 6, 8  # layers of the small models, and steps after a first pass
_LEAST_LAYERS = 4  # of messages after work


class HardwareNow:
    """Measurements of what each rank computes on, to be repeated; all ranks call all methods.

    Args:
        job: The job.
        timeout_s: How long a rank waits for another.
        shape: The model, for the sizes of the matrices and how many experts a rank has. Its
            number of layers, the tokens and the passes to be predicted play no part.
        hosts_are_simulated: Whether all hosts of the job are this machine.
    """

    def __init__(
        self, job: Job, timeout_s: float, shape: Shape, *, hosts_are_simulated: bool = False
    ) -> None:
        torch.manual_seed(0)
        self._job = job
        self._timeout_s = timeout_s
        on_this_node = job.nodes.count(job.nodes[job.info.rank])
        self._num_ranks_here = job.info.world_size if hosts_are_simulated else on_this_node
        height, width = 2 * shape.moe_intermediate_size, shape.hidden_size
        self._rows = torch.randn((_MANY_ROWS, width), device=job.device)
        read_bytes = max(_READ_BYTES, _ALL_READ_BYTES // self._num_ranks_here)
        num_matrices = max(1, read_bytes // (height * width * 4))
        self._matrices = torch.randn((num_matrices, height, width), device=job.device)
        self._models = {layers: _alone(shape, layers, job) for layers in (_FEW, _MANY)}
        self._prompt = torch.full((1, 4), 3, device=job.device)
        self._samples: list[Device] = []

    def warm_up(self) -> None:
        """Generates once, so that libraries are loaded and memory is touched that all runs need."""
        complete(self._models[_FEW], self._prompt, 2)

    def measure(self, links: Links, prices: LinkPrices) -> None:
        """Measures everything once.

        Args:
            links: What connects all ranks.
            prices: What they cost, measured just now.
        """
        matrices = itertools.cycle(self._matrices)
        product_s = self._seconds(self._multiply)
        read_s = self._seconds(lambda: functional.linear(self._rows[:1], next(matrices)))
        first_s, step_s = {}, {}
        for layers, model in self._models.items():
            first_s[layers] = self._seconds(partial(complete, model, self._prompt, 1))
            all_s = self._seconds(partial(complete, model, self._prompt, 1 + _NEW))
            step_s[layers] = (all_s - first_s[layers]) / _NEW
        layer_s = max(0.0, (step_s[_MANY] - step_s[_FEW]) / (_MANY - _FEW))
        around_s = max(0.0, step_s[_FEW] - _FEW * layer_s)
        launches = Launches(layer_s, around_s, max(0.0, first_s[_FEW] - _FEW * layer_s - around_s))
        flops = 2 * _MANY_ROWS * self._matrices[0].numel() / product_s
        self._samples.append(
            Device(
                name="measured",
                flops_16bit=flops,
                flops_32bit=flops,
                bytes_per_s=self._matrices[0].nbytes / read_s,
                launches=launches,
                memory_bytes=None,
                reserved_bytes=0,
                overlaps=self._job.device.type == "cuda",
                source="by launch/bench.py predict, all ranks at once",
                wait_s=self._wait(links, prices),
            )
        )

    def device(self) -> Device:
        """Returns the medians of what was measured."""

        def middle(of: Callable[[Device], float]) -> float:
            return median(of(sample) for sample in self._samples)

        return replace(
            self._samples[0],
            flops_16bit=middle(lambda sample: sample.flops_16bit),
            flops_32bit=middle(lambda sample: sample.flops_32bit),
            bytes_per_s=middle(lambda sample: sample.bytes_per_s),
            launches=Launches(
                middle(lambda sample: sample.launches.layer_s),
                middle(lambda sample: sample.launches.step_s),
                middle(lambda sample: sample.launches.start_s),
            ),
            memory_bytes=_memory_bytes(self._job),
            is_shared=self._is_shared(),
            wait_s=middle(lambda sample: sample.wait_s),
        )

    def _is_shared(self) -> bool:
        """Says whether there are more ranks on this machine than cores for them."""
        return self._job.device.type != "cuda" and self._num_ranks_here > num_usable_cores()

    def _wait(self, links: Links, prices: LinkPrices) -> float:
        """Returns what messages cost more after work than they do among ranks that are idle.

        The work is a pass that is told operation by operation, as a job's are. Where ranks take
        turns on a core, each finds the caches full of another's; a product in a loop hardly minds.
        """
        if links.flat.size == 1:
            return 0.0
        levels = [(links.flat, prices.flat)]
        if links.across and links.within and prices.across and prices.within:
            levels = [(links.across, prices.across), (links.within, prices.within)]
        work = partial(self._models[_FEW], input_ids=self._prompt[:, :1])
        work_s = self._seconds(work)
        num_layers = max(_LEAST_LAYERS, round(_WINDOW_S / (2 * work_s)))
        num_layers = max(self._job.all_gather(num_layers))

        def layer() -> None:
            work()
            for comm, _ in levels:
                comm.gather_rows((self._rows[:1],), [1] * comm.size)
            work()
            for comm, _ in reversed(levels):
                comm.reduce_rows(self._rows[: comm.size], [1] * comm.size)

        layer()  # brings the ranks together
        start = time.perf_counter()
        for _ in range(num_layers):
            layer()
        wait(self._job.device)
        layer_s = (time.perf_counter() - start) / num_layers
        known_s = 2 * work_s
        known_s += sum(price.gather.latency_s + price.reduce.latency_s for _, price in levels)
        return max(0.0, mean(self._job.all_gather(layer_s - known_s)) / 2)

    def _multiply(self) -> Tensor:
        """Multiplies many rows by a matrix that stays in the cache."""
        return functional.linear(self._rows, self._matrices[0])

    def _seconds(self, run: Callable[[], object]) -> float:
        """Returns the seconds of a call while all ranks make such calls, of the mean rank."""
        run()
        self._job.wait_for_all(self._timeout_s, "measuring the hardware")
        window_s = max(_WINDOW_S, _OWN_S * self._num_ranks_here / num_usable_cores())
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < window_s:
            run()
            wait(self._job.device)
            calls += 1
        rates = self._job.all_gather(calls / (time.perf_counter() - start))
        return len(rates) / sum(rates)


def _alone(shape: Shape, num_layers: int, job: Job) -> PreTrainedModel:
    """Builds a small model that this rank runs by itself, with as many experts as in the job.

    All else is tiny, so that it is told what to do, and has next to nothing to do.
    """
    num_experts = max(1, shape.num_experts // job.info.world_size)
    top_k = min(num_experts, shape.top_k)
    small = replace(SHAPES["tiny"], num_layers=num_layers, num_experts=num_experts, top_k=top_k)
    model = Qwen3MoeForCausalLM(small.config()).to(job.device).eval()
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="allgather")
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    prepare_for_inference(model)

    def announce(module: object, args: Sequence[Tensor], kwargs: dict[str, Tensor]) -> None:
        num_tokens = kwargs["input_ids"].numel()
        for layer in layers:
            layer.announce([num_tokens])

    model.register_forward_pre_hook(announce, with_kwargs=True)
    return model


def _memory_bytes(job: Job) -> int | None:
    """Returns what this rank may take: of its GPU, or its part of the machine's memory."""
    if job.device.type == "cuda":
        return torch.cuda.get_device_properties(job.device).total_memory
    found = available_bytes()
    return None if found is None else found // max(1, job.nodes.count(job.nodes[job.info.rank]))
