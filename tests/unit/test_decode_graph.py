"""What decode passes of one shape are, and which models have them."""

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny

_BATCH, _CACHE = 2, 12


def _graph(model):
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="alltoall")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    return DecodeGraph(model, layers, world_size=1, batch_size=_BATCH, cache_len=_CACHE)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("gpt_oss", {}, "cache changes its shape (StaticSlidingWindowLayer)"),
        ("jamba", {}, "cache changes its shape (LinearAttentionLayer)"),
        ("olmoe", {"intermediate_size": 10}, "in a way of their own"),
        (
            "olmoe",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "has dynamic rotary positions",
        ),
    ],
)
def test_a_model_whose_passes_differ_is_refused(family, settings, reason):
    with pytest.raises(ConfigError) as refused:
        _graph(build_tiny(family, **settings))
    assert reason in str(refused.value)
    assert "Leave --cuda-graphs out" in str(refused.value)


def test_settings_of_the_model_are_not_captured():
    model = build_tiny("olmoe")
    own = {"cache_implementation": "static", "stop_strings": "the", "num_beams": 2}
    for name, value in own.items():
        setattr(model.generation_config, name, value)
    assert _graph(model).num_replays == 0
    assert {name: getattr(model.generation_config, name) for name in own} == own


@pytest.fixture(scope="module")
def seen():
    """A graph, and what its model's forward was given while it generated."""
    model = build_tiny("olmoe").eval()
    graph, given = _graph(model), []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((kwargs, graph.fits(kwargs))), with_kwargs=True
    )
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    graph.cache.reset()
    with torch.no_grad():
        model.generate(ids, past_key_values=graph.cache, max_new_tokens=4, do_sample=False)
    return graph, given


def test_decode_passes_of_its_cache_fit(seen):
    _, given = seen
    assert [fits for _, fits in given] == [False, True, True, True]


@pytest.mark.parametrize(
    "changed",
    [
        {"past_key_values": None},
        {"input_ids": torch.zeros((_BATCH + 1, 1), dtype=torch.int64)},
        {"input_ids": torch.zeros((_BATCH, 1), dtype=torch.int32)},
        {"use_cache": None},
        {"labels": None},
    ],
    ids=["another cache", "more rows", "another dtype", "another setting", "one more"],
)
def test_others_do_not(seen, changed):
    graph, given = seen
    assert not graph.fits(given[-1][0] | changed)


def test_a_pass_is_replayed_once_it_is_switched_on(seen):
    graph, given = seen
    before = graph.num_replays
    model_forward, kwargs = graph._run, given[-1][0]
    graph.cache.reset()
    with torch.no_grad():
        expected = model_forward(**kwargs).logits
        assert graph.num_replays == before
        graph.cache.reset()
        graph.switch_on(None)
        torch.testing.assert_close(model_forward(**kwargs).logits, expected)
    assert graph.num_replays == before + 1
