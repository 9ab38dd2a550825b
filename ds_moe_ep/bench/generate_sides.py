"""Greedy generation by a whole model, as ours and as its peers run it, with the same weights.

A side is a function from this rank's prompts to their completions. Every rank calls it at the same
time; a side of one process does the whole batch on rank 0.
"""

# Shapes: B prompts, S tokens of a prompt, N new tokens

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.distributed import DistributedConfig

from ds_moe_ep.adapter import bind_expert_groups, moe_layers, prepare_for_inference
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.options import positive
from ds_moe_ep.engine.sync import ForwardSync, shared_by_all
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.local_machine import num_usable_cores
from ds_moe_ep.plan import ParallelPlan

__all__ = [
    "PAD",
    "GenerateSide",
    "add_batch_arguments",
    "check_batches",
    "complete",
    "load_ours",
    "one_process",
    "transformers_ep",
]

PAD = 0
"""What short prompts are padded with."""

GenerateSide = Callable[[Tensor, int], "Tensor | None"]
"""Takes all prompts ``[B, S]`` and N; returns this rank's ``[B / ranks, S + N]`` tokens, or those
of all prompts on rank 0 and None elsewhere."""


def add_batch_arguments(
    parser: argparse.ArgumentParser, *, world: list[int], new_tokens: int
) -> None:
    """Adds what tables of generation are asked alike: --world, --model, --batch, --new-tokens.

    Args:
        parser: Of the table.
        world: Numbers of ranks by default.
        new_tokens: Tokens to generate by default.
    """
    add = parser.add_argument
    add("--world", type=positive(int), nargs="+", default=world, help="numbers of ranks")
    add("--model", choices=SHAPES, default="105M", help="model to run (default: %(default)s)")
    add("--batch", type=positive(int), nargs="+", default=[16, 64], help="prompts in all")
    add("--new-tokens", type=int, default=new_tokens, help="tokens to generate after each prompt")


def check_batches(batches: Sequence[int], worlds: Sequence[int]) -> None:
    """Refuses batches that ranks cannot share, before any is measured.

    Args:
        batches: Prompts of all ranks together, above 0.
        worlds: Numbers of ranks, above 0.

    Raises:
        ConfigError: Some number of ranks does not divide a batch.
    """
    step = math.lcm(*worlds)
    for batch in batches:
        for world_size in worlds:
            if batch % world_size:
                raise ConfigError(
                    f"--world {world_size} does not divide --batch {batch}: every rank generates "
                    f"for as many prompts. Use a multiple of {step}, as --batch "
                    f"{-(-batch // step) * step}."
                )


def load_ours(
    folder: Path,
    job: Job,
    dispatcher: str,
    dtype: torch.dtype = torch.float32,
    *,
    captured: tuple[int, int] | None = None,
) -> tuple[PreTrainedModel, GenerateSide]:
    """Returns a rank's part of a model with experts spread over all ranks, and its generation.

    It generates as infer.py does. With the allreduce dispatcher every rank does the whole batch,
    and rank 0 returns it.

    Args:
        folder: The model.
        job: The job.
        dispatcher: Name of the dispatcher.
        dtype: Of the weights.
        captured: B of this rank and S + N at most, as of which decode passes are replayed, as with
            ``infer.py --cuda-graphs``; None replays none.
    """
    info = job.info
    model, report = load_expert_parallel_model(
        folder,
        ParallelPlan(info.world_size),
        ep_rank=info.rank,
        dtype=dtype,
        device=job.device,
        dispatcher=dispatcher,
    )
    bind_expert_groups(model, nodes=job.nodes, device=job.device)
    prepare_for_inference(model)
    layers = moe_layers(model)
    live_rows = LiveRows([], job.device)
    graph = None
    if captured is not None:
        batch_size, cache_len = captured
        graph = DecodeGraph(
            model, layers, world_size=info.world_size, batch_size=batch_size, cache_len=cache_len
        )
    sync = ForwardSync(
        model,
        layers,
        dist.group.WORLD,
        top_k=model.config.num_experts_per_tok,
        dtype=model.dtype,
        device=job.device,
        shared=shared_by_all(layers, info.world_size),
        live_rows=live_rows,
        graph=graph,
    )

    is_replicated = dispatcher == "allreduce"

    def generate(prompts_BS: Tensor, num_new: int) -> Tensor | None:
        mine_BS = prompts_BS.to(job.device) if is_replicated else _own(prompts_BS, job)
        live_rows.start_batch(mine_BS != PAD)
        with_graph: dict[str, Any] = {}
        if graph is not None:
            graph.cache.reset()
            with_graph = {"past_key_values": graph.cache, "disable_compile": True}
        completed = complete(model, mine_BS, num_new, **with_graph)
        sync.join_others()
        return None if is_replicated and info.rank != 0 else completed

    return model, generate


def transformers_ep(folder: Path, job: Job, dtype: torch.dtype = torch.float32) -> GenerateSide:
    """Returns generation with transformers' own expert parallelism.

    Ranks with batches of their own need its FSDP, so the dense weights are gathered every pass.
    """
    size = job.info.world_size
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=dtype,
        distributed_config=DistributedConfig(ep_size=size, fsdp_size=size),
    ).eval()
    return lambda prompts_BS, num_new: complete(
        model, _own(prompts_BS, job), num_new, synced_gpus=True
    )


def one_process(
    folder: Path, job: Job, experts_implementation: str, dtype: torch.dtype = torch.float32
) -> GenerateSide:
    """Returns generation of the whole batch by rank 0 alone, with a thread for every core."""
    model = None
    if job.info.rank == 0:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, experts_implementation=experts_implementation
        )
        model = model.to(job.device).eval()

    def generate(prompts_BS: Tensor, num_new: int) -> Tensor | None:
        if model is None:
            return None
        with _all_cores():
            return complete(model, prompts_BS.to(job.device), num_new)

    return generate


def _own(prompts_BS: Tensor, job: Job) -> Tensor:
    return prompts_BS.chunk(job.info.world_size)[job.info.rank].to(job.device)


def complete(model: PreTrainedModel, prompts_BS: Tensor, num_new: int, **kwargs: Any) -> Tensor:
    """Generates so many tokens after each prompt, greedily.

    Args:
        model: The model.
        prompts_BS: Prompts, padded to one length on the left.
        num_new: New tokens.
        **kwargs: More for ``generate``.

    Returns:
        Prompts and new tokens ``[B, S + N]``.
    """
    completed = model.generate(
        prompts_BS,
        attention_mask=(prompts_BS != PAD).long(),
        min_new_tokens=num_new,
        max_new_tokens=num_new,
        do_sample=False,
        pad_token_id=PAD,
        **kwargs,
    )
    return cast(Tensor, completed)


@contextmanager
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
