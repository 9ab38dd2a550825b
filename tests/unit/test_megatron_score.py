"""Which rank goes through Megatron's model with which prompts, and what comes out of it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.tasks import EncodedPrompt
from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.job import _check_arguments
from ds_moe_ep.megatron.score import Pass, plan_passes, score_pass


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=30),
    st.integers(1, 8),
    st.integers(1, 5),
    st.booleans(),
)
def test_all_ranks_make_as_many_passes_with_each_prompt_in_one(
    lengths, world_size, batch_size, same_shape
):
    passes_of = plan_passes(lengths, world_size, batch_size, same_shape=same_shape)
    assert len(passes_of) == world_size
    assert len({len(passes) for passes in passes_of}) == 1
    served = [index for passes in passes_of for each in passes for index in each.indices]
    assert sorted(served) == list(range(len(lengths)))
    for together in zip(*passes_of, strict=True):
        assert any(each.indices for each in together)
        for each in together:
            longest = max((lengths[index] for index in each.indices), default=1)
            assert max(1, len(each.indices)) <= each.rows <= batch_size
            assert each.length >= longest
            assert same_shape or (each.rows, each.length) == (max(1, len(each.indices)), longest)
        if same_shape:
            assert len({(each.rows, each.length) for each in together}) == 1


def test_a_rank_without_prompts_takes_part_with_one_token():
    assert plan_passes([7], 2, 8, same_shape=False) == [[Pass((0,), 1, 7)], [Pass((), 1, 1)]]
    assert plan_passes([7], 2, 8, same_shape=True) == [[Pass((0,), 1, 7)], [Pass((), 1, 7)]]


def encoded(index, *token_ids):
    return EncodedPrompt(Prompt(str(index), None, token_ids), token_ids)


def test_scores_are_of_each_token_after_those_before_it():
    prompts = [encoded(0, 3, 1), encoded(1, 2), encoded(2, 1, 2, 3)]
    logits_BLV = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    seen = []

    def model(ids_BL, positions_BL, mask):
        seen.append((ids_BL.tolist(), positions_BL.tolist(), mask))
        return logits_BLV

    results = score_pass(model, Pass((2, 0), 3, 4), prompts, torch.device("cpu"))
    assert seen == [([[1, 2, 3, 0], [3, 1, 0, 0], [0] * 4], [[0, 1, 2, 3]] * 3, None)]
    assert [(result.id, result.num_tokens) for result in results] == [("2", 3), ("0", 2)]
    probabilities = logits_BLV.double().exp() / logits_BLV.double().exp().sum(-1, keepdim=True)
    first = [probabilities[0, 0, 2].log().item(), probabilities[0, 1, 3].log().item()]
    assert results[0].token_logprobs == pytest.approx(first, rel=1e-5)
    assert results[0].logprob == pytest.approx(sum(first), rel=1e-5)
    assert results[1].token_logprobs == pytest.approx([probabilities[1, 0, 1].log().item()], 1e-5)


def test_a_prompt_of_one_token_has_nothing_to_score():
    logits = torch.zeros(1, 1, 5)
    (result,) = score_pass(
        lambda *given: logits, Pass((0,), 1, 1), [encoded(0, 4)], torch.device("cpu")
    )
    assert (result.num_tokens, result.logprob, result.token_logprobs) == (1, 0.0, ())


@pytest.mark.parametrize("part", ["tensor_model", "pipeline_model", "context"])
def test_ranks_that_share_a_prompt_or_dense_weights_are_refused(part):
    sizes = {
        f"{each}_parallel_size": 2 if each == part else 1
        for each in ("tensor_model", "pipeline_model", "context")
    }
    options = SimpleNamespace(args=Path("megatron.args"))
    flag = f"--{part.replace('_', '-')}-parallel-size 2 in megatron.args"
    with pytest.raises(MegatronError, match=flag):
        _check_arguments(SimpleNamespace(**sizes), options, job=None)
