"""One GPU plays a rank of a job of four: a captured decode step against the eager one."""

from collections.abc import Iterator

import pytest
import torch
from transformers import StaticCache

from ds_moe_ep.bench.replayed_rank import announce, build_own_part, join_fake_job
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.decode_graph import capture
from tests.helpers.families import FAMILIES, VOCAB_SIZE

WORLD_SIZE, NUM_TOKENS, STEPS = 4, 3, 3


@pytest.fixture
def job() -> Iterator[Job]:
    yield join_fake_job(1, WORLD_SIZE)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3"])
def test_a_captured_decode_step_equals_the_eager_one(tmp_path, job, family) -> None:
    FAMILIES[family]().save_pretrained(tmp_path)
    model = build_own_part(str(tmp_path), job, torch.bfloat16, "allgather")
    announce(model, NUM_TOKENS, WORLD_SIZE)
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids_ST1 = torch.randint(3, VOCAB_SIZE, (STEPS, NUM_TOKENS, 1), device=job.device)
    ids_T1 = ids_ST1[0].clone()
    logits = []

    def step() -> None:
        logits[:] = [model(ids_T1, past_key_values=cache).logits]

    def decode(run) -> list[torch.Tensor]:
        cache.reset()
        steps = []
        for fresh_T1 in ids_ST1:
            ids_T1.copy_(fresh_T1)
            run()
            steps.append(logits[0].clone())
        return steps

    with torch.no_grad():
        expected = decode(step)
        cache.reset()
        replay = capture(step).replay
        actual = decode(replay)
    # The same kernels on the same memory: bf16 roundings at most.
    torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)
    assert not torch.equal(actual[0], actual[-1])
