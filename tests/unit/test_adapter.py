"""The swap itself, in one process: what goes in, what DeepSpeed sees of it, what is refused."""

import pytest
import torch
from deepspeed.moe.utils import has_moe_layers, is_moe_param
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlamaConfig,
)

from ds_moe_ep.adapter import AdaptReport, adapt, moe_layers, shard_experts
from ds_moe_ep.adapter.replace import SwappedLayer
from ds_moe_ep.checkpoint.load import build_on_meta
from ds_moe_ep.errors import AdapterError, DistributedError
from ds_moe_ep.model_families import UNSUPPORTED
from ds_moe_ep.moe.experts import expert_parameters
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import CORE_FAMILIES, FAMILIES, NUM_EXPERTS, build_tiny


def _experts(model, layer):
    return model.get_submodule(f"model.layers.{layer}.mlp.experts.deepspeed_moe.experts")


def test_a_loaded_model_keeps_the_experts_of_its_rank():
    reference = build_tiny("olmoe")
    for ep_rank in range(4):
        model = build_tiny("olmoe")
        adapt(model, ParallelPlan(4), ep_rank=ep_rank)
        for layer in range(3):
            kept = _experts(model, layer)
            whole = reference.get_submodule(f"model.layers.{layer}.mlp.experts")
            assert kept.num_experts == 2
            for name, param in kept.named_parameters():
                wanted = whole.get_parameter(name)[2 * ep_rank : 2 * ep_rank + 2]
                assert torch.equal(param, wanted)
                # Of its own memory, or the other ranks' experts would stay in this one's.
                assert param.untyped_storage().nbytes() == wanted.nbytes


@pytest.mark.parametrize("family", CORE_FAMILIES)
def test_every_family_is_swapped_on_the_meta_device(family):
    model = build_on_meta(FAMILIES[family](), torch.float32)
    report = adapt(model, ParallelPlan(4), ep_rank=3)
    assert [layer.local_experts for layer in report.layers] == [range(6, 8)] * len(report.layers)
    assert {param.device.type for param in model.parameters()} == {"meta"}
    for layer in moe_layers(model):
        experts = expert_parameters(layer.deepspeed_moe.experts)
        assert {len(param) for param in experts.values()} == {NUM_EXPERTS // 4}


def test_a_group_of_one_computes_what_the_model_did():
    prompt = torch.tensor([[5, 9, 33, 4]])
    model, reference = build_tiny("deepseek_v3"), build_tiny("deepseek_v3")
    adapt(model, ParallelPlan(1), ep_rank=0)
    for layer in moe_layers(model):
        layer.deepspeed_moe._set_ep_group(None)
    with torch.no_grad():
        actual, expected = model(prompt).logits, reference(prompt).logits
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_deepspeed_sees_moe_layers_and_expert_parameters():
    model = build_tiny("qwen2_moe")
    assert has_moe_layers(model) == (False, 0)
    adapt(model, ParallelPlan(4, dp_size=2), ep_rank=1)
    assert has_moe_layers(model) == (True, NUM_EXPERTS)
    for name, param in model.named_parameters():
        assert is_moe_param(param) == (".deepspeed_moe." in name)
        if is_moe_param(param):
            assert param.group_name == "ep_size_4"
    for layer in moe_layers(model):
        assert layer.expert_group_name == "ep_size_4"
        assert (layer.num_experts, layer.num_local_experts, layer.ep_size) == (NUM_EXPERTS, 2, 4)


def test_router_and_shared_experts_stay_the_models_own():
    model, reference = build_tiny("qwen2_moe"), build_tiny("qwen2_moe")
    report = adapt(model, ParallelPlan(2), ep_rank=0)
    swapped = {layer.name for layer in report.layers}
    assert swapped == {"model.layers.0.mlp.experts", "model.layers.2.mlp.experts"}  # 1 is dense
    kinds = {name: type(module) for name, module in model.named_modules()}
    for name, module in reference.named_modules():
        if not name.startswith(tuple(swapped)):
            assert kinds[name] is type(module)


def test_whether_a_parameter_is_trained_does_not_change():
    model = build_tiny("olmoe")
    model.get_parameter("model.layers.1.mlp.experts.down_proj").requires_grad_(False)
    adapt(model, ParallelPlan(2), ep_rank=0)
    assert not _experts(model, 1).down_proj.requires_grad
    assert _experts(model, 1).gate_up_proj.requires_grad


def test_the_report_says_what_was_swapped():
    report = adapt(build_tiny("mixtral"), ParallelPlan(4), ep_rank=2)
    assert str(report) == (
        "3 MoE layers (MixtralExperts) swapped: ep_rank 2 of 4 holds experts 4 to 5 of 8 in each"
    )
    assert report == AdaptReport(
        tuple(
            SwappedLayer(f"model.layers.{layer}.mlp.experts", "MixtralExperts", 8, range(4, 6))
            for layer in range(3)
        ),
        ep_rank=2,
        ep_size=4,
    )


def test_a_layer_without_its_group_says_how_to_bind_it():
    model = build_tiny("olmoe")
    adapt(model, ParallelPlan(1), ep_rank=0)
    with pytest.raises(DistributedError, match=r"bind_expert_groups\(model\) after init_dist"):
        model(torch.tensor([[1]]))


def test_an_ep_size_that_does_not_divide_the_experts():
    with pytest.raises(AdapterError) as refused:
        adapt(build_tiny("olmoe"), ParallelPlan(3), ep_rank=0)
    assert str(refused.value) == (
        "ep_size=3 does not divide num_experts=8 (model.layers.0.mlp.experts): every rank must "
        "own the same number of experts. Use ep_size in [1, 2, 4, 8]."
    )


def test_a_dense_model():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    with pytest.raises(AdapterError) as refused:
        adapt(AutoModelForCausalLM.from_config(config), ParallelPlan(2), ep_rank=0)
    assert "LlamaForCausalLM has no layer that follows" in str(refused.value)
    assert "upcycle the model: copy each FFN into every expert" in str(refused.value)


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_family_without_a_way_to_spread_it(model_type):
    config = AutoConfig.for_model(model_type)
    with pytest.raises(AdapterError) as refused:
        build_on_meta(config, torch.float32)
    reason = UNSUPPORTED[model_type]
    assert str(refused.value) == f"{model_type} models cannot be spread over ranks: {reason}"


def test_a_loaded_model_of_such_a_family():
    config = AutoConfig.for_model("llama4_text", num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(AdapterError, match="llama4_text models cannot be spread over ranks: every"):
        adapt(model, ParallelPlan(2), ep_rank=0)


def test_a_model_that_needs_a_package_that_is_missing(monkeypatch):
    def fail(config, **kwargs):
        raise ModuleNotFoundError("No module named 'scipy'")

    monkeypatch.setattr(AutoModelForMultimodalLM, "from_config", fail)
    with pytest.raises(AdapterError) as refused:
        build_on_meta(AutoConfig.for_model("inkling_mm_model"), torch.float32)
    assert str(refused.value) == (
        "inkling_mm_model: transformers needs a package that is missing here: No module named "
        "'scipy'. Install it on every host."
    )


def test_a_model_that_is_no_language_model():
    with pytest.raises(AdapterError, match="vit: transformers cannot build it"):
        build_on_meta(AutoConfig.for_model("vit"), torch.float32)


def test_a_parameter_of_all_experts_is_not_an_expert_parameter():
    model = build_tiny("muse_spark")
    adapt(model, ParallelPlan(4), ep_rank=1)
    for name, param in model.named_parameters():
        assert is_moe_param(param) == (".deepspeed_moe." in name and "norm" not in name)


def test_experts_in_a_space_narrower_than_the_model():
    for family, width in {"nemotron_h": 12, "muse_spark": 20, "aria_text": 32}.items():
        model = build_tiny(family)
        adapt(model, ParallelPlan(2), ep_rank=0)
        assert {layer.hidden_size for layer in moe_layers(model)} == {width}


def test_a_model_that_was_cut_for_another_ep_size():
    model = build_tiny("olmoe")
    shard_experts(model, 4, ep_rank=0)
    with pytest.raises(AdapterError, match="was cut to 2 experts a rank; ep_size=2 needs 4"):
        adapt(model, ParallelPlan(2), ep_rank=0)
