"""The measurement of what work costs makes as many passes on every rank, whatever tokens come."""

from types import SimpleNamespace

import torch

from ds_moe_ep.adapter import adapt, moe_layers, prepare_for_inference
from ds_moe_ep.bringup.distribution import measure_cost
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import VOCAB_SIZE, build_tiny

_CONTEXT = 64  # of the tiny models


def test_no_token_ends_a_measurement():
    model = build_tiny("olmoe")
    own = model.generation_config
    own.eos_token_id = list(range(VOCAB_SIZE))  # whatever comes first is an end
    own.exponential_decay_length_penalty = (1, 1.5)  # which asks for end tokens
    adapt(model, ParallelPlan(1), ep_rank=0, dispatcher="alltoall")
    prepare_for_inference(model)
    layers = moe_layers(model)
    for layer in layers:
        layer.deepspeed_moe._set_ep_group(None)
    shapes = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    job = SimpleNamespace(info=SimpleNamespace(world_size=1), all_gather=lambda own: [own])
    engine = SimpleNamespace(module=model, generate=model.generate)
    assert measure_cost(job, engine, layers, _CONTEXT, VOCAB_SIZE) is not None
    # A short and a long prompt with one new token, and a short one with three, in three rounds.
    a_round = [(4, 4), (4, 36), (4, 4), (4, 1), (4, 1)]
    assert shapes == [torch.Size(shape) for shape in 3 * a_round]
    assert model.generation_config is own
    assert own.eos_token_id == list(range(VOCAB_SIZE))
    assert own.min_new_tokens is None
    assert [int(layer.deepspeed_moe.tokens_per_expert.sum()) for layer in layers] == [0, 0, 0]
