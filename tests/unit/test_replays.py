"""What is counted of replays, and how long one may take; a GPU is played by stand-ins."""

from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.dist import moments
from ds_moe_ep.engine import decode_graph
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.decoding import Rooms
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.sampling import SeededDraw
from ds_moe_ep.engine.tasks import EncodedPrompt, GenerateSettings, generate_batch
from ds_moe_ep.errors import DistributedError
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_FREE = Price(0.0, 0.0)
_PRICES = LinkPrices(GroupPrices(1, 0.0, _FREE, _FREE, _FREE))


class _Event:
    """One of a GPU, which is said to have passed when it is asked the `num_queries`-th time."""

    def __init__(self, num_queries: float) -> None:
        self.num_queries, self.asked = num_queries, 0

    def query(self) -> bool:
        self.asked += 1
        return self.asked >= self.num_queries


class _Captured:
    """A CUDA graph, in which nothing happens."""

    is_held = True

    def replay(self) -> None:
        assert self.is_held

    def reset(self) -> None:
        self.is_held = False


def _layers_of(model):
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="auto")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe.prices = _PRICES
        layer.deepspeed_moe._set_ep_group(None)
    return layers


def _graph(world_size=1, timeout_s=None):
    model = build_tiny("olmoe")
    layers = _layers_of(model)
    graph = DecodeGraph(
        model, layers, world_size=world_size, batch_size=2, cache_len=12, timeout_s=timeout_s
    )
    return graph, layers


def test_what_is_done_to_capture_a_pass_does_not_count():
    graph, layers = _graph()
    counts = [layer.deepspeed_moe for layer in layers]
    assert [each.describe_dispatch() for each in counts] == ["no pass yet"] * len(layers)
    assert [each.stats.calls for each in counts] == [0] * len(layers)
    assert [int(each.tokens_per_expert.sum()) for each in counts] == [0] * len(layers)
    assert graph.num_replays == 0


@pytest.mark.parametrize("calls_layers", [True, False], ids=["CPU", "GPU"])
def test_the_dispatcher_of_each_replay_is_counted_once(monkeypatch, calls_layers):
    def capture(step):
        step()
        step()
        return _Captured()

    if not calls_layers:
        monkeypatch.setattr(decode_graph, "_can_capture", lambda device: True)
        monkeypatch.setattr(decode_graph, "capture", capture)
    graph, layers = _graph()
    with torch.no_grad():
        for _ in range(3):
            graph.replay_without_rows()
    assert graph.num_replays == 3
    for layer in layers:
        assert layer.deepspeed_moe.dispatcher.calls == {"allgather": 3}
        assert layer.deepspeed_moe.describe_dispatch().startswith("allgather in 3 of 3 passes")


def test_what_was_captured_is_let_go_of(monkeypatch):
    captured = _Captured()
    monkeypatch.setattr(decode_graph, "_can_capture", lambda device: True)
    monkeypatch.setattr(decode_graph, "capture", lambda step: [step(), captured][1])
    graph, _ = _graph()
    assert captured.is_held
    graph.close()
    assert not captured.is_held


def test_a_replay_that_ranks_do_not_come_to_ends(monkeypatch):
    graph, _ = _graph(world_size=2, timeout_s=0.05)
    monkeypatch.setattr(decode_graph, "now", lambda device: _Event(float("inf")))
    with torch.no_grad(), pytest.raises(DistributedError) as lost:
        graph.replay_without_rows()
    assert "a replayed pass was not done within 0.05 s: another rank is hung" in str(lost.value)


@pytest.mark.parametrize(
    ("world_size", "timeout_s", "asked"),
    [(2, 60.0, 5), (1, 60.0, 0), (2, None, 0)],
    ids=["others", "nobody to wait for", "no bound"],
)
def test_a_replay_waits_for_the_gpu_where_others_may_not_come(
    monkeypatch, world_size, timeout_s, asked
):
    graph, _ = _graph(world_size, timeout_s)
    event = _Event(5)
    monkeypatch.setattr(decode_graph, "now", lambda device: event)
    with torch.no_grad():
        graph.replay_without_rows()
    assert event.asked == asked
    assert graph.num_replays == 1


@pytest.mark.parametrize(
    ("pass_s", "num_sleeps"), [(0.9e-3, 0), (10.9e-3, 66)], ids=["short", "long"]
)
def test_a_long_wait_sleeps_and_a_short_one_does_not(monkeypatch, pass_s, num_sleeps):
    now_s, slept = 0.0, []

    def sleep(seconds):
        nonlocal now_s
        slept.append(seconds)
        now_s += seconds

    def has_passed(_):
        nonlocal now_s
        now_s += 1e-4  # of a look
        return now_s >= pass_s

    monkeypatch.setattr(moments.time, "monotonic", lambda: now_s)
    monkeypatch.setattr(moments.time, "sleep", sleep)
    monkeypatch.setattr(moments, "has_passed", has_passed)
    moments.wait_within(0.0, timeout_s=1.0, not_done="a pass was not done")
    # After the first millisecond, as many as fit with a look each.
    assert len(slept) == pytest.approx(num_sleeps, abs=1 if num_sleeps else 0)


def test_a_step_waits_for_its_replay_after_all_of_it_is_told():
    told = []
    rooms = Rooms(
        [1, 3], prompt_len=4, device=torch.device("cpu"), wait=lambda: told.append("wait")
    )
    assert rooms(torch.zeros(2, 6), None).tolist() == [True, False]
    assert told == ["wait"]


def test_a_draw_waits_for_its_pass_first(monkeypatch):
    told = []
    draw = SeededDraw.__call__
    monkeypatch.setattr(DecodeGraph, "wait", lambda self: told.append("wait"))
    monkeypatch.setattr(SeededDraw, "__call__", lambda *args: [told.append("draw"), draw(*args)][1])
    model = build_tiny("olmoe")
    layers = _layers_of(model)
    graph = DecodeGraph(model, layers, world_size=1, batch_size=2, cache_len=12)
    prompts = [EncodedPrompt(Prompt(str(i), None, (3, 4)), (3, 4)) for i in range(2)]
    engine = SimpleNamespace(module=model, generate=model.generate)
    told.clear()
    how = GenerateSettings(max_new_tokens=3, context_length=64, temperature=1.0)
    generate_batch(engine, prompts, how, None, None, graph)
    assert told == ["wait", "draw", "wait"] * 3
