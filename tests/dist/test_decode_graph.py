"""Ranks with unequal batches replay passes of one shape together; tokens are as they were."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

from ds_moe_ep.adapter import bind_expert_groups, moe_layers, prepare_for_inference
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.engine.tasks import EncodedPrompt, GenerateSettings, generate_batch
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import FAMILIES, save_tiny

_WORLD_SIZE, _BATCH, _NEW = 4, 3, 6
_LENGTHS = [
    [(7, 2, 1), (4,)],  # of the prompts of each batch of each rank
    [(3, 1)],
    [],
    [(5, 2), (1, 1, 1), (6,)],
]
_CPU = torch.device("cpu")


def _prompts(rank: int) -> list[list[EncodedPrompt]]:
    batches = []
    for number, lengths in enumerate(_LENGTHS[rank]):
        batch = []
        for place, length in enumerate(lengths):
            ids = tuple(3 + (7 * rank + 11 * number + 5 * place + i) % 50 for i in range(length))
            name = f"{rank} {number} {place}"
            batch.append(EncodedPrompt(Prompt(name, None, ids), ids))
        batches.append(batch)
    return batches


def _alone(folder: Path) -> dict[str, list[int]]:
    """What transformers generates for each prompt by itself, without an end token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = {"max_new_tokens": _NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return {
        each.prompt.id: model.generate(torch.tensor([each.token_ids]), **settings)[
            0, len(each.token_ids) :
        ].tolist()
        for rank in range(_WORLD_SIZE)
        for batch in _prompts(rank)
        for each in batch
    }


def _generate(rank: int, world_size: int, folder: Path, dispatcher: str, end: int) -> dict:
    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    model, _ = load_expert_parallel_model(
        folder,
        ParallelPlan(world_size),
        ep_rank=rank,
        dtype=torch.float32,
        device=_CPU,
        dispatcher=dispatcher,
    )
    bind_expert_groups(model, device=_CPU)  # with it `auto` chooses
    prepare_for_inference(model)
    model.generation_config.eos_token_id = end
    layers = moe_layers(model)
    graph = DecodeGraph(model, layers, world_size=world_size, batch_size=_BATCH, cache_len=7 + _NEW)
    calls_before = sum(layer.deepspeed_moe.stats.calls for layer in layers)
    live_rows = LiveRows([end], _CPU)
    sync = ForwardSync(
        model,
        layers,
        dist.group.WORLD,
        top_k=model.config.num_experts_per_tok,
        dtype=model.dtype,
        device=_CPU,
        live_rows=live_rows,
        graph=graph,
    )

    class Engine:
        module, generate = model, staticmethod(model.generate)

    settings = GenerateSettings(max_new_tokens=_NEW, context_length=64)
    tokens = {}
    for batch in _prompts(rank):
        for result in generate_batch(Engine, batch, settings, None, live_rows, graph):
            tokens[result.id] = list(result.token_ids)
    sync.join_others()
    return {
        "tokens": tokens,
        "steps": sync.num_steps,
        "replays": graph.num_replays,
        "calls_before": calls_before,
        "dispatch": layers[0].deepspeed_moe.describe_dispatch(),
        "rows": [int(layer.deepspeed_moe.tokens_per_expert.sum()) for layer in layers],
    }


@pytest.mark.parametrize(
    ("family", "dispatcher"),
    [("olmoe", "auto"), ("olmoe", "allgather"), ("deepseek_v3", "auto"), ("qwen3_moe", "auto")],
)
def test_tokens_are_those_of_each_prompt_alone(tmp_path, family, dispatcher):
    folder = tmp_path / family
    save_tiny(family, folder)
    alone = _alone(folder)
    end = alone["3 0 0"][2]  # so that some prompts end early
    expected = {
        name: tokens[: tokens.index(end) + 1] if end in tokens else tokens
        for name, tokens in alone.items()
    }
    assert len({len(tokens) for tokens in expected.values()}) > 1
    ranks = run_ranks(_generate, _WORLD_SIZE, tmp_path, folder, dispatcher, end)
    assert {name: ids for rank in ranks for name, ids in rank["tokens"].items()} == expected
    # All ranks replay the same passes: also the one without prompts, and those whose are done.
    (steps,) = {rank["steps"] for rank in ranks}
    (replays,) = {rank["replays"] for rank in ranks}
    num_batches = sum(len(batches) for batches in _LENGTHS)
    assert 0 < steps - replays <= num_batches  # only where some rank reads prompts
    assert replays > 0
    assert [rank["calls_before"] for rank in ranks] == [0] * _WORLD_SIZE  # of capturing
    if dispatcher == "auto":  # what was chosen is told of each pass, and of no other
        for rank in ranks:
            told = re.findall(r" in (\d+) of (\d+) passes", rank["dispatch"])
            assert sum(int(passes) for passes, _ in told) == steps
            assert {int(total) for _, total in told} == {steps}
    # Experts have computed what was live, and none of the rows that fill the shape.
    live = sum(
        len(each.token_ids) + len(expected[each.prompt.id]) - 1
        for rank in range(_WORLD_SIZE)
        for batch in _prompts(rank)
        for each in batch
    )
    (rows,) = {sum(of_layer) for of_layer in zip(*(rank["rows"] for rank in ranks), strict=True)}
    assert rows == live * FAMILIES[family]().num_experts_per_tok
