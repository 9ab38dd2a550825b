"""What is recorded of passes: loads against Hugging Face's own router, times by their sum."""

import time
from itertools import pairwise

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.sync import ForwardSync
from ds_moe_ep.monitor.metrics_format import PARTS
from ds_moe_ep.monitor.pass_clock import PassClock
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.windows import Borders, LiveBalance, balance_windows
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_CPU = torch.device("cpu")


def test_borders_are_thinned_out_when_there_are_many():
    borders = Borders(2)
    for step in range(10_000):
        if borders.is_next(step):
            borders.add(step, [3 * step, 6 * step])
    borders.add(9999, [3 * 9999, 6 * 9999])
    assert 128 <= len(borders.passed) <= 257
    steps = [border.step for border in borders.passed]
    assert len({late - early for early, late in pairwise(steps[:-1])}) == 1
    assert (steps[0], steps[-1]) == (0, 9999)
    assert all(border.rows == [3 * border.step, 6 * border.step] for border in borders.passed)


def _borders(rows_of_step):
    borders = Borders(2)
    for step, rows in rows_of_step.items():
        borders.add(step, rows)
    return borders


def test_balance_is_that_of_the_rows_between_borders():
    one = _borders({8: [10, 0], 16: [20, 30], 19: [20, 30]})
    other = _borders({8: [30, 20], 16: [40, 30], 19: [40, 30]})
    windows = [
        (window.first_step, window.last_step, window.overall, window.layers)
        for window in balance_windows([one.passed, other.passed])
    ]
    assert windows == [
        (1, 8, 30 / 50, [20 / 30, 10 / 20]),  # 10 and 0 rows against 30 and 20
        (9, 16, 30 / 40, [10 / 10, 20 / 30]),  # 10 and 30 against 10 and 10
        (17, 19, 1.0, [1.0, 1.0]),  # no rows at all
    ]


def test_live_balance_is_told_of_borders_that_all_ranks_have():
    one = _borders({8: [10, 0]})
    other = _borders({8: [30, 20], 16: [40, 30]})
    live = LiveBalance(2, 2)
    live.update([one.passed[:1], other.recent()])  # the first has not told of step 8 yet
    assert live.window is None
    live.update([one.recent(), other.recent()])
    assert (live.window.first_step, live.window.last_step) == (1, 8)
    assert live.window == balance_windows([one.passed, other.passed[:2]])[0]
    one.add(16, [20, 30])
    one.add(24, [20, 30])
    live.update([one.recent(), other.recent()])
    assert (live.window.first_step, live.window.last_step) == (9, 16)
    assert live.window.overall == 30 / 40


def test_parts_of_a_pass_sum_to_its_time():
    clock = PassClock(_CPU)
    clock.enter("experts")  # outside of a pass nothing is counted
    splits = []
    for kind in ("prefill", *["decode"] * 10):
        splits.append(clock.start(kind))
        for part in ("attention", "dispatch", "experts", "experts", "combine", "other"):
            clock.enter(part)
            time.sleep(0.002)
        clock.stop()
    clock.finish()
    assert splits == [True, False, True, *[False] * 7, True]
    decode = clock.times["decode"]
    assert (decode.count, decode.durations.count, clock.times["prefill"].count) == (10, 10, 1)
    parts = decode.estimated_parts_s()
    assert sum(parts.values()) == pytest.approx(decode.durations.total_s)
    assert 2 * 6 * 0.002 <= sum(decode.parts_s.values()) < decode.durations.total_s
    assert parts["experts"] >= 2 * 2 * 0.002 and parts["router"] == 0.0


def test_what_the_first_decode_pass_sets_up_is_not_taken_for_a_part_of_others():
    clock = PassClock(_CPU)
    for setup_s in (0.2, 0.0, 0.0):
        clock.start("decode")
        clock.enter("attention")
        time.sleep(setup_s)
        clock.enter("experts")
        time.sleep(0.01)
        clock.stop()
    times = clock.times["decode"]
    parts = times.estimated_parts_s()
    assert parts["experts"] > 0.9 * sum(parts.values())
    assert times.durations.max_s >= 0.2  # it is timed all the same


def _num_hooks(model):
    return sum(len(module._forward_hooks) for module in model.modules())


@pytest.mark.parametrize("family", ["olmoe", "qwen2_moe", "deepseek_v3", "mixtral", "gpt_oss"])
def test_loads_are_those_of_the_models_own_router(family):
    model = build_tiny(family).eval()
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="alltoall")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    num_hooks = _num_hooks(model)
    recorder = Recorder(model, layers, device=_CPU)
    live_rows = LiveRows([], _CPU)
    ForwardSync(model, layers, None, top_k=1, dtype=model.dtype, device=_CPU, live_rows=live_rows)
    chosen: list[torch.Tensor] = []
    for layer in layers:  # what the model's router hands to the experts, unchanged
        layer.register_forward_pre_hook(lambda module, args: chosen.append(args[1].clone()))
    ids = torch.randint(3, 60, (3, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    recorder.start_batch()
    live_rows.start_batch(mask)
    recorder.start_step(1)  # as ForwardSync would tell
    with torch.no_grad():
        model.generate(ids, attention_mask=mask, max_new_tokens=4, eos_token_id=None)
    recorder.start_step(4)
    recorder.close()
    num_experts = layers[0].num_experts
    live = [mask.flatten().bool(), *[torch.ones(3, dtype=torch.bool)] * 3]
    expected = torch.zeros((len(layers), num_experts), dtype=torch.int64)
    for call, topk_ids in enumerate(chosen):
        rows = topk_ids[live[call // len(layers)]]
        expected[call % len(layers)] += torch.bincount(rows.flatten(), minlength=num_experts)
    # What experts have computed is what the router chose of live tokens, and nothing else.
    computed = torch.stack([layer.deepspeed_moe.tokens_per_expert for layer in layers])
    assert torch.equal(computed, expected) and expected.sum() > 0
    assert recorder.borders.passed[-1].rows == expected.sum(dim=1).tolist()
    times = recorder.clock.times
    assert (times["prefill"].count, times["decode"].count) == (1, 3)
    assert recorder.first_token_s.count == 1
    assert all(seconds > 0 for seconds in times["decode"].parts_s.values()), times["decode"]
    assert set(times["decode"].parts_s) == set(PARTS)
    assert not model._forward_hooks and len(model._forward_pre_hooks) == 1  # of ForwardSync
    assert _num_hooks(model) == num_hooks
    assert all(layer.deepspeed_moe.on_part is None for layer in layers)
