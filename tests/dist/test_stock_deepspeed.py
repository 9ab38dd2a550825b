"""Why this package exists: DeepSpeed's own MoE layer dies where ranks have unequal token counts.

If the last test fails, DeepSpeed has learned to serve such ranks.
"""

from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE
from torch import nn

from ds_moe_ep.adapter import adapt, bind_expert_groups
from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import NUM_EXPERTS, build_tiny

_WORLD_SIZE = 2
_HIDDEN = 8
_TOKENS = (5, 40)  # of rank 0 and of rank 1
_FP32 = {"rtol": 1e-5, "atol": 1e-6}


def _ours_then_theirs(rank: int, world_size: int, folder: Path) -> None:
    """Serves unequal counts with our layer, then with theirs; leaves a file for all that worked."""
    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    config = {"dtype": "float32", "moe": {"ep_size": world_size, "num_experts": [NUM_EXPERTS]}}

    model = build_tiny("olmoe")
    adapt(model, ParallelPlan(world_size), ep_rank=rank)
    bind_expert_groups(model)
    ours = deepspeed.init_inference(model, config=config)
    prompt = torch.arange(3, 3 + _TOKENS[rank])[None]
    with torch.no_grad():
        actual, expected = ours(prompt).logits, build_tiny("olmoe")(prompt).logits
    torch.testing.assert_close(actual, expected, **_FP32)
    (folder / f"ours-{rank}").touch()

    layer = MoE(
        _HIDDEN,
        nn.Linear(_HIDDEN, _HIDDEN),
        num_experts=NUM_EXPERTS,
        ep_size=world_size,
        drop_tokens=False,
    )
    theirs = deepspeed.init_inference(layer, config=config)
    assert layer.deepspeed_moe.ep_group is None
    theirs(torch.ones(1, min(_TOKENS), _HIDDEN))
    (folder / f"theirs-with-equal-counts-{rank}").touch()
    theirs(torch.ones(1, _TOKENS[rank], _HIDDEN))
    (folder / f"theirs-{rank}").touch()
    torch.distributed.barrier()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory) -> tuple[set[str], str]:
    """The names of what worked, and how the job ended; one that hangs is ended."""
    folder = tmp_path_factory.mktemp("stock")
    try:
        run_ranks(_ours_then_theirs, _WORLD_SIZE, folder, folder, timeout_s=90)
        ended = "well"
    except AssertionError as failed:
        ended = str(failed)
    return {path.name for path in folder.iterdir() if path.is_file()}, ended


@pytest.mark.parametrize("what", ["ours", "theirs-with-equal-counts"])
def test_this_works(outcome, what):
    worked, ended = outcome
    assert {f"{what}-{rank}" for rank in range(_WORLD_SIZE)} <= worked, ended


def test_the_stock_layer_dies_of_unequal_counts(outcome):
    worked, ended = outcome
    assert not {f"theirs-{rank}" for rank in range(_WORLD_SIZE)} <= worked
    assert "all_to_all_single" in ended  # the exchange on the world group, not on the expert group
