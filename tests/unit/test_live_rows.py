"""Which rows of a batch experts are spared, and that nobody can tell by the tokens."""

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.engine.tasks import pad_left
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_CPU = torch.device("cpu")
_END = 5


def test_padding_and_what_follows_an_end_token_are_not_live():
    live = LiveRows([_END], _CPU)
    live.start_batch(torch.tensor([[0, 1, 1], [1, 1, 1]]))
    first = live.of_pass(torch.tensor([[0, 7, _END], [7, 8, 9]]))
    assert first.tolist() == [False, *[True] * 5]  # an end token in a prompt ends nothing
    assert live.of_pass(torch.tensor([[8], [9]])) is None  # all
    passes = [[[8], [_END]], [[_END], [0]], [[0], [0]]]
    tokens = [live.of_pass(torch.tensor(ids)).tolist() for ids in passes]
    assert tokens == [[True, False], [False, False], [False, False]]
    assert live.num_completing == 2 + 2 + 1
    live.start_batch(torch.tensor([[1], [1]]))
    assert live.of_pass(torch.tensor([[1], [_END]])) is None


def test_a_row_without_a_prompt_is_never_live():
    live = LiveRows([], _CPU)
    live.start_batch(torch.tensor([[1, 1], [0, 0]]))
    assert live.of_pass(torch.tensor([[7, 8], [0, 0]])).tolist() == [True, True, False, False]
    assert live.of_pass(torch.tensor([[9], [9]])).tolist() == [True, False]
    assert live.num_completing == 2


def test_a_row_ends_with_its_room():
    live = LiveRows([_END], _CPU)
    live.start_batch(torch.tensor([[1], [1]]), rooms=[1, 3])
    passes = [live.of_pass(torch.tensor([[7], [8]])) for _ in range(4)]
    assert passes[0] is None
    assert [each.tolist() for each in passes[1:]] == [[False, True]] * 2 + [[False, False]]
    assert live.num_completing == 1 + 3
    live.start_batch(torch.tensor([[1]]))
    assert [live.of_pass(torch.tensor([[7]])) for _ in range(4)] == [None] * 4


@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gpt_oss", "qwen3_next", "jamba"])
def test_tokens_are_those_of_each_prompt_alone(family):
    """Prompts of many lengths, some of which end early, against transformers with one at a time."""
    reference = build_tiny(family).eval()
    prompts = [[3 + (11 * i + 5 * j) % 50 for j in range(1 + 3 * i)] for i in range(5)]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    alone = [
        reference.generate(torch.tensor([ids]), eos_token_id=None, **settings)[0, len(ids) :]
        for ids in prompts
    ]
    end = int(alone[1][2])  # so that one prompt ends at its third token
    expected = []
    for tokens in alone:
        found = (tokens == end).nonzero()
        expected.append(tokens[: int(found[0]) + 1 if len(found) else None].tolist())

    model = build_tiny(family).eval()
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="alltoall")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    live_rows = LiveRows([end], _CPU)
    ForwardSync(model, layers, None, top_k=1, dtype=model.dtype, device=_CPU, live_rows=live_rows)
    ids_BL, mask_BL = pad_left(prompts, 0, _CPU)
    live_rows.start_batch(mask_BL)
    with torch.no_grad():
        output = model.generate(ids_BL, attention_mask=mask_BL, eos_token_id=end, **settings)
    for row, tokens in zip(output[:, ids_BL.shape[1] :].tolist(), expected, strict=True):
        assert row[: len(tokens)] == tokens
    assert live_rows.num_completing == sum(map(len, expected))
    live = sum(map(len, prompts)) + sum(len(tokens) - 1 for tokens in expected)
    rows = {int(layer.deepspeed_moe.tokens_per_expert.sum()) for layer in layers}
    top_k = rows.pop() / live
    assert not rows and top_k == int(top_k) >= 1
