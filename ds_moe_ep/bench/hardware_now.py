"""Measures what predictions start from, on all ranks at once, so that what they share is shared.

The rates of products and of reading weights; what a pass costs that has next to nothing to compute.
"""

# Shapes: B prompts, S tokens of a prompt

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen3MoeForCausalLM

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.bench.floors import wait
from ds_moe_ep.bench.generate_sides import complete
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.host_memory import available_bytes
from ds_moe_ep.moe.cost_model import GroupPrices
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.hardware import Device, Launches

__all__ = ["HardwareNow"]

# Each thing is repeated for so long, while all other ranks do the same.
_WINDOW_S = 0.3
_SIZE = 512  # rows and columns of the matrices
_ROW_COLUMNS = 256  # of a small message
_READ_BYTES = 64 << 20  # more than a core's cache keeps
_FEW, _MANY, _NEW = 2, 6, 8  # layers of the small models, and steps after a first pass


class HardwareNow:
    """Measurements of what each rank computes on, to be repeated; all ranks call all methods.

    Args:
        job: The job.
        timeout_s: How long a rank waits for another.
    """

    def __init__(self, job: Job, timeout_s: float) -> None:
        torch.manual_seed(0)
        self._job = job
        self._timeout_s = timeout_s
        device = job.device
        self._rows = torch.randn((_SIZE, _SIZE), device=device)
        num_matrices = _READ_BYTES // (_SIZE * _SIZE * 4)
        self._matrices = torch.randn((num_matrices, _SIZE, _SIZE), device=device)
        self._models = {layers: _alone(layers, job) for layers in (_FEW, _MANY)}
        self._prompt = torch.full((1, 4), 3, device=device)
        self._samples: list[Device] = []

    def warm_up(self) -> None:
        """Generates once, so that libraries are loaded and memory is touched that all runs need."""
        complete(self._models[_FEW], self._prompt, 2)

    def measure(self, comm: Communicator, prices: GroupPrices) -> None:
        """Measures everything once.

        Args:
            comm: Collectives of all ranks.
            prices: What they cost, measured just now.
        """
        read, row = 0, self._rows[:1]

        def read_next() -> Tensor:
            nonlocal read
            read += 1
            return torch.nn.functional.linear(row, self._matrices[read % len(self._matrices)])

        product_s = self._seconds(lambda: self._rows @ self._rows)
        read_s = self._seconds(read_next)
        first_s, step_s = {}, {}
        for layers, model in self._models.items():
            first_s[layers] = self._seconds(partial(complete, model, self._prompt, 1))
            all_s = self._seconds(partial(complete, model, self._prompt, 1 + _NEW))
            step_s[layers] = (all_s - first_s[layers]) / _NEW
        layer_s = max(0.0, (step_s[_MANY] - step_s[_FEW]) / (_MANY - _FEW))
        around_s = max(0.0, step_s[_FEW] - _FEW * layer_s)
        launches = Launches(layer_s, around_s, max(0.0, first_s[_FEW] - _FEW * layer_s - around_s))
        flops = 2 * _SIZE**3 / product_s
        self._samples.append(
            Device(
                name="measured",
                flops_16bit=flops,
                flops_32bit=flops,
                bytes_per_s=4 * _SIZE * _SIZE / read_s,
                launches=launches,
                memory_bytes=None,
                reserved_bytes=0,
                overlaps=self._job.device.type == "cuda",
                source="measured in the same run, all ranks at once",
                stretch=self._stretch(comm, prices, product_s),
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
            is_shared=_is_shared(self._job),
            stretch=middle(lambda sample: sample.stretch),
        )

    def _stretch(self, comm: Communicator, prices: GroupPrices, product_s: float) -> float:
        """Returns how much longer products take between the messages of layers than without."""
        if comm.size == 1:
            return 1.0
        one_each, row_TC = [1] * comm.size, self._rows[:1, :_ROW_COLUMNS].contiguous()
        rows_RC = row_TC.repeat(comm.size, 1)
        num_layers = max(2, round(_WINDOW_S / (2 * product_s)))
        num_layers = max(self._job.all_gather(num_layers))
        self._job.wait_for_all(self._timeout_s, "measuring the hardware")
        start = time.perf_counter()
        for _ in range(num_layers):
            self._rows @ self._rows
            comm.gather_rows((row_TC,), one_each)
            self._rows @ self._rows
            comm.reduce_rows(rows_RC, one_each)
        wait(self._job.device)
        layer_s = (time.perf_counter() - start) / num_layers
        work_s = layer_s - prices.gather.latency_s - prices.reduce.latency_s
        return max(1.0, max(self._job.all_gather(work_s / (2 * product_s))))

    def _seconds(self, run: Callable[[], object]) -> float:
        """Returns the seconds of a call while all ranks make such calls, of the mean rank."""
        run()
        self._job.wait_for_all(self._timeout_s, "measuring the hardware")
        start, calls = time.perf_counter(), 0
        while time.perf_counter() - start < _WINDOW_S:
            run()
            wait(self._job.device)
            calls += 1
        rates = self._job.all_gather(calls / (time.perf_counter() - start))
        return len(rates) / sum(rates)


def _alone(num_layers: int, job: Job) -> PreTrainedModel:
    """Builds a small model that this rank runs by itself, in the layers that a job has."""
    shape = replace(SHAPES["tiny"], num_layers=num_layers)
    model = Qwen3MoeForCausalLM(shape.config()).to(job.device).eval()
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


def _is_shared(job: Job) -> bool:
    """Says whether there are more ranks on a machine than cores, or simulated hosts on one."""
    return job.device.type != "cuda" and job.info.world_size > (os.cpu_count() or 1)
