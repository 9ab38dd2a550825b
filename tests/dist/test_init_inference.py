"""DeepSpeed's engine on a model in bfloat16: what must stay in float32 does."""

from pathlib import Path

import deepspeed
import torch

from ds_moe_ep.adapter import bind_expert_groups
from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.config.deepspeed import inference_config
from ds_moe_ep.dist.groups import RankInfo, init_distributed
from ds_moe_ep.engine.loading import init_inference
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan
from tests.helpers import run_ranks
from tests.helpers.families import build_tiny, save_tiny

_KEPT = ("e_score_correction_bias", "inv_freq")


def _kept_after(rank: int, world_size: int, folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Starts DeepSpeed's own engine and ours; returns the tensors to keep, by who started it."""
    init_distributed(RankInfo(rank, rank, world_size), timeout_s=60)
    plan = ParallelPlan(world_size)
    config = inference_config(plan, read_model_spec(folder), dtype="bfloat16")
    kept = {}
    for start in (deepspeed.init_inference, init_inference):
        model, _ = load_expert_parallel_model(folder, plan, ep_rank=rank, dtype=torch.bfloat16)
        bind_expert_groups(model)
        start(model, config=config)
        assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
        assert model(torch.tensor([[5, 9]])).logits.isfinite().all()
        kept[start.__module__] = {
            name: buffer for name, buffer in model.named_buffers() if name.endswith(_KEPT)
        }
    return kept


def test_correction_biases_and_rotary_frequencies_stay_in_float32(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    (kept,) = run_ranks(_kept_after, 1, tmp_path, tmp_path)
    wanted = dict(build_tiny("deepseek_v3").named_buffers())
    ours, theirs = kept[init_inference.__module__], kept["deepspeed"]
    assert {name.rpartition(".")[2] for name in ours} >= set(_KEPT)
    for name, buffer in ours.items():
        torch.testing.assert_close(buffer, wanted[name], rtol=0, atol=0)
    # If this fails, DeepSpeed has learned to spare them, and ours can go.
    assert {buffer.dtype for buffer in theirs.values()} == {torch.bfloat16}
    assert any(not torch.equal(theirs[name].float(), ours[name]) for name in ours)
