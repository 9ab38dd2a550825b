"""A pass through a model with its experts spread over ranks is one graph to torch.compile.

With the allgather dispatcher and announced tokens; the experts run as they do on a GPU, where
nothing is read by the host.
"""

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.testing import CompileCounter
from transformers import StaticCache

from ds_moe_ep.adapter import moe_layers
from ds_moe_ep.bench.replayed_rank import announce, build_own_part, join_fake_job
from ds_moe_ep.moe import layer
from ds_moe_ep.moe.experts import run_static
from tests.helpers.families import FAMILIES

NUM_TOKENS, STEPS = 3, 3


@pytest.fixture(params=[4, 8], ids=["two experts a rank", "one expert a rank"])
def job(request):
    yield join_fake_job(1, request.param)
    dist.destroy_process_group()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_decode_steps_are_compiled_once_and_in_one_piece(tmp_path, monkeypatch, job, family):
    monkeypatch.setattr(layer, "run_local_experts", run_static)
    torch._dynamo.reset()
    FAMILIES[family]().save_pretrained(tmp_path)
    # In bfloat16, as compiled grouped products on a CPU want it.
    model = build_own_part(str(tmp_path), job, torch.bfloat16, "allgather")
    for moe in moe_layers(model):  # with torch's own collectives, not the replay's copies
        moe.deepspeed_moe._set_ep_group(dist.group.WORLD)
    announce(model, NUM_TOKENS, job.info.world_size)
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids_T1 = torch.full((NUM_TOKENS, 1), 3)
    graphs = CompileCounter()
    compiled = torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)

    def decode(step) -> list[torch.Tensor]:
        cache.reset()
        return [step(ids_T1, past_key_values=cache).logits for _ in range(STEPS)]

    with torch.no_grad():
        expected = decode(model)
        actual = decode(compiled)
    assert graphs.frame_count == 1
    torch.testing.assert_close(actual, expected)
    for moe in moe_layers(model):  # both have counted their rows
        assert moe.deepspeed_moe.tokens_per_expert.sum() > 0
