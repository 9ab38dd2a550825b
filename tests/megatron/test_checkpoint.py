"""Converted checkpoints in Megatron's own hands: loaded by all its checks, saved, converted back.

That what is loaded computes what Hugging Face does is tested in test_parity.py.
"""

import multiprocessing
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from ds_moe_ep.checkpoint.megatron.convert import from_megatron, to_megatron
from ds_moe_ep.config.megatron import MegatronOptions, megatron_args
from ds_moe_ep.megatron.arguments import parse_arguments
from ds_moe_ep.megatron.model import build_model, start_model_parallel
from ds_moe_ep.megatron.stand_ins import megatron_stand_ins
from ds_moe_ep.model_spec import model_spec_from_config
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import build_tiny
from tests.helpers.families.megatron import MEGATRON_CASES

SAVE = "--no-save-optim --no-save-rng --ckpt-format torch_dist --save-interval 1 --save".split()
LOAD = "--finetune --no-load-optim --no-load-rng --dist-ckpt-strictness raise_all --load".split()


@pytest.fixture(scope="module")
def saved_by_megatron(tmp_path_factory):
    """A folder for each case: the source, what it was converted to, and what Megatron saved."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for case, (family, changes) in MEGATRON_CASES.items():
        build_tiny(family, **changes).save_pretrained(folder / case / "source")
        to_megatron(folder / case / "source", folder / case / "converted", "local")
    run_ranks(load_and_save, 2, folder, folder, "converted", (1, 2), timeout_s=240)
    run_ranks(load_and_save, 4, folder, folder, "ep2", (1, 4), timeout_s=240)
    return folder


@megatron_stand_ins()
def load_and_save(
    rank: int, world_size: int, folder: Path, name: str, ep_sizes: tuple[int, ...]
) -> None:
    """Loads the checkpoint `name` of every case at each size, at 1 first, and saves it there."""
    from megatron.core import parallel_state

    saved_before = os.listdir(folder / "olmoe")
    dist.barrier()
    whole = {}
    for ep_size in ep_sizes:
        start_model_parallel(parsed(build_tiny("olmoe"), ep_size), timeout_s=60)
        for case, (family, changes) in MEGATRON_CASES.items():
            hf = build_tiny(family, **changes)
            model = empty_model(hf, ep_size)
            load_by_megatron(model, hf, ep_size, folder / case / name)
            whole.setdefault(case, model)
            assert_holds_its_part(model, whole[case], ep_size)
            if f"ep{ep_size}" not in saved_before:
                save_by_megatron(model, hf, ep_size, folder / case / f"ep{ep_size}")
        parallel_state.destroy_model_parallel()


def words_for(hf, ep_size, *more):
    config = hf.config.to_dict() | {"dtype": "float32"}
    spec = model_spec_from_config(config, source="config.json", name="tiny")
    plan = ParallelPlan(ep_size=ep_size, dp_size=dist.get_world_size() // ep_size)
    text = megatron_args(plan, spec, config, MegatronOptions("local"))
    return [word for line in text.splitlines() if line[0] != "#" for word in line.split()] + [*more]


def parsed(hf, ep_size, *more):
    words = words_for(hf, ep_size, *more)
    return parse_arguments(words, rank=dist.get_rank(), world_size=dist.get_world_size())


def empty_model(hf, ep_size):
    model = build_model(parsed(hf, ep_size), torch.device("cpu"))
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.fill_(float("nan"))
    return model


def load_by_megatron(model, hf, ep_size, folder):
    from megatron.training import checkpointing, global_vars

    global_vars.set_args(parsed(hf, ep_size, *LOAD, str(folder)))
    iteration, _ = checkpointing.load_checkpoint([model], None, None)
    assert iteration == 0
    global_vars.unset_global_variables()


def save_by_megatron(model, hf, ep_size, folder):
    """Saves as Megatron's training does, but for the optimizer, which needs a GPU."""
    from megatron.training import checkpointing, global_vars

    # Megatron's writer starts processes, which a daemon may not, as every rank here is one.
    multiprocessing.current_process()._config["daemon"] = False
    global_vars.set_args(parsed(hf, ep_size, *SAVE, str(folder)))
    with mock.patch.object(
        torch.cuda, "get_rng_state", torch.get_rng_state
    ):  # asked for all the same
        checkpointing.save_checkpoint(100, [model], None, None, 0)
    global_vars.unset_global_variables()


def assert_holds_its_part(model, whole, ep_size):
    """Checks every tensor, and that this rank's experts are those of its place."""
    from megatron.core import parallel_state

    ep_rank = parallel_state.get_expert_model_parallel_rank()
    expected = whole.state_dict()
    tensors = {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    assert not any(tensor.isnan().any() for tensor in tensors.values())
    for name, tensor in tensors.items():
        before, is_expert, after = name.partition("local_experts.")
        if is_expert:
            expert, _, after = after.partition(".")
            expert = int(expert) + ep_rank * model.config.num_moe_experts // ep_size
            name = f"{before}local_experts.{expert}.{after}"
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("case", MEGATRON_CASES)
@pytest.mark.parametrize("name", ["ep1", "ep2", "ep4"])
def test_what_megatron_saved_comes_back_bit_by_bit(case, name, saved_by_megatron, tmp_path):
    source = saved_by_megatron / case / "source"
    from_megatron(saved_by_megatron / case / name, tmp_path / "hf", source)
    wanted = load_file(source / "model.safetensors")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert sorted(os.listdir(tmp_path / "hf")) == sorted(os.listdir(source))
