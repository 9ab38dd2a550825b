"""The adapted model against Hugging Face itself, family by family, from router to tokens."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.helpers import run_ranks
from tests.helpers.families import FAMILIES, VOCAB_SIZE, save_tiny

WORLD_SIZES = (1, 2, 4)
NEW_TOKENS = 6
# Uneven on purpose: with 4 ranks one of them has no prompt.
PROMPTS = [
    torch.randint(3, VOCAB_SIZE, (1, length), generator=torch.Generator().manual_seed(length))
    for length in (5, 11, 2)
]
FP32 = {"rtol": 1e-5, "atol": 1e-6}


def observe(
    model: PreTrainedModel, moe_blocks: Sequence[str], prompt: Tensor, generate: Any
) -> dict[str, Any]:
    """Runs one prompt; returns what routers, MoE blocks and head gave, and the greedy tokens."""
    seen: dict[str, Any] = {}

    def keep(name: str):
        return lambda module, args, output: seen.__setitem__(name, output)

    watched = [
        child
        for block in moe_blocks
        for child in (block, f"{block}.{_router_name(model.get_submodule(block))}")
    ]
    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in watched]
    with torch.no_grad():
        seen["logits"] = model(input_ids=prompt).logits
    for hook in hooks:
        hook.remove()
    seen["tokens"] = generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
    )
    return seen


def _router_name(block: torch.nn.Module) -> str:
    (name,) = (name for name, _ in block.named_children() if name in ("gate", "router"))
    return name


def run_families(
    rank: int, world_size: int, folders: dict[str, Path]
) -> dict[str, dict[int, dict[str, Any]]]:
    """Loads every family with the experts of this rank and observes every world_size-th prompt."""
    from ds_moe_ep.adapter import bind_expert_groups, moe_layers
    from ds_moe_ep.checkpoint import load_expert_parallel_model
    from ds_moe_ep.config.deepspeed import inference_config
    from ds_moe_ep.dist.groups import RankInfo, init_distributed
    from ds_moe_ep.engine.job import init_inference
    from ds_moe_ep.engine.sync import ForwardSync
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.plan import ParallelPlan

    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    observed: dict[str, dict[int, dict[str, Any]]] = {}
    for family, folder in folders.items():
        plan, spec = ParallelPlan(ep_size=world_size), read_model_spec(folder)
        model, report = load_expert_parallel_model(folder, plan, ep_rank=rank)
        bind_expert_groups(model)
        engine = init_inference(model, inference_config(plan, spec, dtype="float32"))
        layers = moe_layers(model)
        sync = ForwardSync(
            model,
            layers,
            torch.distributed.group.WORLD,
            top_k=spec.top_k,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        blocks = [layer.name.rpartition(".")[0] for layer in report.layers]
        observed[family] = {
            index: observe(model, blocks, PROMPTS[index], engine.generate)
            for index in range(rank, len(PROMPTS), world_size)
        }
        sync.join_others()
    return observed


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    for family in FAMILIES:
        save_tiny(family, root / family)
    return {family: root / family for family in FAMILIES}


@pytest.fixture(scope="module", params=WORLD_SIZES, ids=lambda size: f"ep{size}")
def observed(request, folders, tmp_path_factory) -> list[dict[str, dict[int, dict[str, Any]]]]:
    """What each rank saw: one job for all families, because starting ranks is what costs time."""
    return run_ranks(
        run_families, request.param, tmp_path_factory.mktemp("parity"), folders, timeout_s=300
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_adapted_model_equals_hugging_face(observed, folders, family: str) -> None:
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folders[family], dtype=torch.float32)
    blocks = [
        name.rpartition(".")[0]
        for name, module in reference.named_modules()
        if hasattr(module, "_apply_gate")
    ]
    assert blocks
    by_prompt = {index: seen for rank in observed for index, seen in rank[family].items()}
    assert sorted(by_prompt) == list(range(len(PROMPTS)))
    for index, actual in by_prompt.items():
        expected = observe(reference, blocks, PROMPTS[index], reference.generate)
        assert actual.keys() == expected.keys()
        torch.testing.assert_close(actual["tokens"], expected.pop("tokens"), rtol=0, atol=0)
        for name, wanted in expected.items():
            torch.testing.assert_close(
                actual[name], wanted, **FP32, msg=lambda text, name=name: f"{name}: {text}"
            )
