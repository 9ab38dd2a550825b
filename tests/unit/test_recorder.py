"""What is recorded of passes: loads against Hugging Face's own router, times by their sum."""

import time

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.monitor.loads import Windows
from ds_moe_ep.monitor.metrics_format import PARTS
from ds_moe_ep.monitor.pass_clock import PassClock
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_CPU = torch.device("cpu")


def test_windows_are_merged_when_there_are_many():
    windows, total = Windows(), 0
    for step in range(1, 10_000):
        if windows.is_full_at(step):
            windows.close([total, 2 * total])
        total += 3
    assert len(windows.rows) < 256
    # Each is as long as the last but those that were full when the length doubled.
    assert all(row == [3 * windows.num_steps, 6 * windows.num_steps] for row in windows.rows)


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
    recorder = Recorder(model, layers, device=_CPU)
    live_rows = LiveRows([], _CPU)
    ForwardSync(model, layers, None, top_k=1, dtype=model.dtype, device=_CPU, live_rows=live_rows)
    chosen: list[torch.Tensor] = []
    for layer in layers:  # what the model's router hands to the experts, unchanged
        layer.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
    ids = torch.randint(3, 60, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    recorder.start_batch()
    with torch.no_grad():
        model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    recorder.close()
    num_experts = layers[0].num_experts
    live = [mask.flatten().bool(), *[torch.ones(3, dtype=torch.bool)] * 3]
    expected = torch.zeros_like(recorder.loads.tokens_LE)
    for call, topk_ids in enumerate(chosen):
        rows = topk_ids[live[call // len(layers)]]
        expected[call % len(layers)] += torch.bincount(rows.flatten(), minlength=num_experts)
    assert torch.equal(recorder.loads.tokens_LE, expected) and expected.sum() > 0
    # And the experts have computed these and no others.
    computed = torch.stack([layer.deepspeed_moe.tokens_per_expert for layer in layers])
    assert torch.equal(computed, expected)
    times = recorder.clock.times
    assert (times["prefill"].count, times["decode"].count) == (1, 3)
    assert recorder.first_token_s.count == 1
    assert all(seconds > 0 for seconds in times["decode"].parts_s.values()), times["decode"]
    assert set(times["decode"].parts_s) == set(PARTS)
    assert not model._forward_hooks and len(model._forward_pre_hooks) == 1  # of ForwardSync
    assert all(layer.deepspeed_moe.on_part is None for layer in layers)
