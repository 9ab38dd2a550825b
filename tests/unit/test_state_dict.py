"""Experts go into a state dict and come out of it under DeepSpeed's names."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_moe_ep.adapter import adapt
from ds_moe_ep.moe.state_dict import name_experts_as_deepspeed_does
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import FAMILIES, build_tiny

_EXPERTS = "model.layers.1.mlp.experts.deepspeed_moe.experts"


def _adapted(family, ep_rank=0, **settings):
    model = build_tiny(family, **settings)
    adapt(model, ParallelPlan(4), ep_rank=ep_rank)
    return model


def test_every_expert_has_tensors_of_its_own():
    model = _adapted("olmoe", ep_rank=1)
    state = model.state_dict()
    fused = model.get_parameter(f"{_EXPERTS}.down_proj")
    assert len(fused) == 2
    for expert, wanted in enumerate(fused):
        given = state[f"{_EXPERTS}.deepspeed_experts.{expert}.down_proj"]
        assert torch.equal(given, wanted)
        assert given.data_ptr() == wanted.data_ptr()  # no memory of its own
    assert f"{_EXPERTS}.down_proj" not in state


# One whose experts share a norm, one with biases.
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "muse_spark"])
def test_what_is_given_is_taken_again(family):
    if family not in FAMILIES:
        pytest.skip(f"this transformers has no {family}")
    model, other = _adapted(family), _adapted(family, seed=1)
    other.load_state_dict(model.state_dict())
    for (name, wanted), (_, loaded) in zip(
        model.named_parameters(), other.named_parameters(), strict=True
    ):
        assert torch.equal(wanted, loaded), name


def test_what_all_experts_share_is_given_with_each():
    if "muse_spark" not in FAMILIES:
        pytest.skip("this transformers has no muse_spark")
    norms = [key for key in _adapted("muse_spark").state_dict() if "post_expert_norm" in key]
    assert norms
    assert all(".deepspeed_experts." in key for key in norms)
    assert {key.split(".deepspeed_experts.")[1] for key in norms} == {
        "0.post_expert_norm.weight",
        "1.post_expert_norm.weight",
    }


class _Experts(nn.Module):
    """As many experts as asked for, with parameters of one shape each."""

    def __init__(self, num_experts, shape):
        super().__init__()
        self.num_experts = num_experts
        for name in ("gate_up_proj", "down_proj", "down_proj_bias", "scale"):
            of_all = () if name == "scale" else (num_experts,)
            self.register_parameter(name, nn.Parameter(torch.randn((*of_all, *shape))))


@given(num_experts=st.integers(1, 40), shape=st.lists(st.integers(0, 3), max_size=2).map(tuple))
def test_no_expert_is_taken_for_another(num_experts, shape):
    experts, others = (_Experts(num_experts, shape) for _ in range(2))
    for module in (experts, others):
        name_experts_as_deepspeed_does(module)
    state = experts.state_dict()
    assert len(state) == num_experts * 4
    others.load_state_dict(dict(reversed(state.items())))
    for name, param in experts.named_parameters():
        assert torch.equal(param, others.get_parameter(name)), name


def test_fused_names_are_taken_too():
    model, other = _adapted("olmoe"), _adapted("olmoe", seed=1)
    other.load_state_dict(dict(model.named_parameters()))
    assert torch.equal(*(m.get_parameter(f"{_EXPERTS}.gate_up_proj") for m in (model, other)))


def test_a_missing_expert_is_missing():
    model = _adapted("olmoe")
    state = model.state_dict()
    del state[f"{_EXPERTS}.deepspeed_experts.1.down_proj"]
    with pytest.raises(RuntimeError, match=rf'Missing key.*"{_EXPERTS}.down_proj"'):
        model.load_state_dict(state)
