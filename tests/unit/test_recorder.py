"""What is recorded of passes: loads against Hugging Face's own router, times by their sum."""

import time

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.balance import balancedness
from ds_moe_ep.monitor.loads import LiveRows, Windows
from ds_moe_ep.monitor.metrics_format import PARTS
from ds_moe_ep.monitor.pass_clock import PassClock
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_CPU = torch.device("cpu")
_END = 5


def test_padding_and_what_follows_an_end_token_are_not_live():
    live = LiveRows([_END], _CPU)
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    first = live.of_pass(torch.tensor([[0, 7, _END], [7, 8, 9]]), mask, is_first=True)
    assert first.tolist() == [0, 1, 1, 1, 1, 1]  # an end token in a prompt ends nothing
    passes = [[[8], [_END]], [[_END], [0]], [[0], [0]]]
    tokens = [live.of_pass(torch.tensor(ids), None, is_first=False).tolist() for ids in passes]
    assert tokens == [[1, 0], [0, 0], [0, 0]]
    assert int(live.num_completing) == 2 + 1
    again = live.of_pass(torch.tensor([[1]]), None, is_first=True)
    assert again.tolist() == [1]


def test_windows_are_merged_when_there_are_many():
    windows, total = Windows(), 0
    for step in range(1, 10_000):
        if windows.is_full_at(step):
            windows.close([total, 2 * total])
        total += 3
    assert len(windows.rows) < 256
    # Each is as long as the last but those that were full when the length doubled.
    assert all(row == [3 * windows.num_steps, 6 * windows.num_steps] for row in windows.rows)


@pytest.mark.parametrize(
    ("rows", "expected"), [([4, 4], 1.0), ([8, 0, 0, 0], 0.25), ([0, 0], 1.0), ([3, 1], 2 / 3)]
)
def test_balancedness_is_mean_over_max(rows, expected):
    assert balancedness(rows) == pytest.approx(expected)


def test_parts_of_a_pass_sum_to_its_time():
    clock = PassClock(_CPU)
    clock.enter("experts")  # outside of a pass nothing is counted
    for kind in ("prefill", "decode", "decode"):
        clock.start(kind)
        for part in ("attention", "dispatch", "experts", "experts", "combine", "other"):
            clock.enter(part)
            time.sleep(0.002)
        clock.stop()
    clock.finish()
    decode = clock.times["decode"]
    assert (decode.count, decode.durations.count, clock.times["prefill"].count) == (2, 2, 1)
    parts = decode.estimated_parts_s()
    assert sum(parts.values()) == pytest.approx(decode.durations.total_s)
    assert parts["experts"] >= 2 * 2 * 0.002 and parts["router"] == 0.0


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_loads_are_those_of_the_models_own_router(family):
    model = build_tiny(family).eval()
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="alltoall")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    recorder = Recorder(model, layers, end_ids=[], device=_CPU)
    chosen: list[torch.Tensor] = []
    for layer in layers:  # what the model's router hands to the experts, unchanged
        layer.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
    ids = torch.randint(3, 60, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    recorder.start_batch()
    with torch.no_grad():
        model.generate(
            ids, attention_mask=mask, max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    recorder.close()
    num_experts = layers[0].num_experts
    live = [mask.flatten().bool(), *[torch.ones(3, dtype=torch.bool)] * 3]
    expected = torch.zeros_like(recorder.loads.tokens_LE)
    for call, topk_ids in enumerate(chosen):
        rows = topk_ids[live[call // len(layers)]]
        expected[call % len(layers)] += torch.bincount(rows.flatten(), minlength=num_experts)
    assert torch.equal(recorder.loads.tokens_LE, expected) and expected.sum() > 0
    assert recorder.new_tokens == 3 * 4
    times = recorder.clock.times
    assert (times["prefill"].count, times["decode"].count) == (1, 3)
    assert recorder.first_token_s.count == 1
    assert all(seconds > 0 for seconds in times["decode"].parts_s.values()), times["decode"]
    assert set(times["decode"].parts_s) == set(PARTS)
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert all(layer.deepspeed_moe.on_part is None for layer in layers)
