"""DeepSpeed loads what was converted for it, at every ep_size, and saves the same itself."""

from pathlib import Path

import deepspeed
import pytest
import torch

from ds_moe_ep.adapter import bind_expert_groups
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.checkpoint.convert import to_deepspeed
from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import FAMILIES, NUM_EXPERTS, save_tiny

_WORLD_SIZE = 2
_CONFIG = {"train_micro_batch_size_per_gpu": 1}
# Tied embeddings and dense layers in between; biases; shared experts and a buffer that is stored;
# a norm that all experts of a layer share.
_WANTED = ("qwen3_moe", "gpt_oss", "deepseek_v3", "muse_spark")
_FAMILIES = [family for family in _WANTED if family in FAMILIES]


def _load_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Has DeepSpeed load each converted model, save it, and load that; compares all tensors."""
    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    for family in _FAMILIES:
        for ep_size in (1, 2):
            plan = ParallelPlan(ep_size, dp_size=world_size // ep_size)
            ep_rank = plan.coordinates(rank).ep_rank
            model, _ = load_expert_parallel_model(folder / family, plan, ep_rank=ep_rank)
            bind_expert_groups(model)
            wanted = _tensors(model)
            engine, *_ = deepspeed.initialize(model=model, config=_CONFIG)
            saved = folder / f"{family}-saved-{ep_size}"
            _load_the_same(engine, folder / f"{family}-deepspeed", wanted)
            engine.save_checkpoint(str(saved))
            _load_the_same(engine, saved, wanted)


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Parameters as they are in memory, and the buffers that are stored."""
    state = model.state_dict()
    buffers = {name: b for name, b in model.named_buffers() if name in state}
    return {name: t.detach().clone() for name, t in [*model.named_parameters(), *buffers.items()]}


def _load_the_same(engine, folder: Path, wanted: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name in wanted:
            holder, _, attribute = name.rpartition(".")
            getattr(engine.module.get_submodule(holder), attribute).fill_(7)
    path, _ = engine.load_checkpoint(str(folder), load_module_only=True)
    assert path is not None
    loaded = _tensors(engine.module)
    assert loaded.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(loaded[name], wanted[name])]
    assert not different, different


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models, converted, after two ranks of DeepSpeed have loaded and saved them."""
    folder = tmp_path_factory.mktemp("deepspeed")
    for family in _FAMILIES:
        save_tiny(family, folder / family)
        to_deepspeed(folder / family, folder / f"{family}-deepspeed")
    run_ranks(_load_and_save, _WORLD_SIZE, folder, folder)
    return folder


@pytest.mark.parametrize("family", _FAMILIES)
def test_what_is_converted_is_what_deepspeed_saves(folder, family):
    converted, *saved = (
        _contents(folder / name)
        for name in (f"{family}-deepspeed", f"{family}-saved-1", f"{family}-saved-2")
    )
    assert len([name for name in converted if name.startswith("layer_0_")]) == NUM_EXPERTS
    for other in saved:
        assert other.keys() == converted.keys()
        for name, tensors in other.items():
            assert tensors.keys() == converted[name].keys(), name
            assert all(torch.equal(tensors[key], converted[name][key]) for key in tensors), name


def _contents(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors in each file of a checkpoint of DeepSpeed, all read without running code."""
    contents = {}
    for path in (folder / (folder / "latest").read_text()).glob("*_model_states.pt"):
        content = torch.load(path, weights_only=True)
        contents[path.name] = content.get("module", content)
    return contents
