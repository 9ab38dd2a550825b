"""The two DeepSpeed configurations, given to DeepSpeed itself."""

import dataclasses
import json
import re

import pytest
import torch

from ds_moe_ep.config.deepspeed import (
    AUTOEP_PRESETS,
    autoep_config,
    dtype_name,
    inference_config,
)
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.launch import REPO

EP64 = ParallelPlan(ep_size=64)
FOLDERS = sorted((REPO / "configs").glob("*-ep64"))
WITH_PRESET = [folder for folder in FOLDERS if (folder / "ds_train_autoep.json").exists()]


def spec(name="olmoe-1b-7b-ep64"):
    return read_model_spec(REPO / "configs" / name / "config.json")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_deepspeed_takes_every_ds_inference_json(folder):
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    config = DeepSpeedInferenceConfig(**json.loads((folder / "ds_inference.json").read_text()))
    model = read_model_spec(folder / "config.json")
    assert config.dtype is torch.bfloat16
    assert config.moe.ep_size == 64
    assert config.moe.moe_experts == [model.num_experts]
    assert config.tensor_parallel.tp_size == 1
    assert config.max_out_tokens == model.max_position_embeddings
    assert config.replace_with_kernel_inject is False


def test_deepspeed_refuses_an_unknown_key_so_the_test_above_can_fail():
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    with pytest.raises(ValueError, match="ep_sise"):
        DeepSpeedInferenceConfig(**{**inference_config(EP64, spec()), "moe": {"ep_sise": 64}})


@pytest.mark.parametrize("spelling", ["fp16", "float16", "half", "torch.float16"])
def test_dtype_takes_every_spelling_of_deepspeed(spelling):
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    config = inference_config(EP64, spec(), dtype=spelling)
    assert config["dtype"] == "float16"
    assert DeepSpeedInferenceConfig(**config).dtype is torch.float16


def test_dtype_spellings_are_deepspeeds():
    from deepspeed.inference.config import DtypeEnum

    for dtype, *spellings in (member.value for member in DtypeEnum):
        for spelling in spellings:
            if dtype is torch.int8:
                with pytest.raises(ConfigError, match="Use one of bfloat16, float16, float32"):
                    dtype_name(spelling)
            else:
                assert getattr(torch, dtype_name(spelling)) is dtype


@pytest.mark.parametrize("make", [inference_config, autoep_config])
@pytest.mark.parametrize("sizes", [{"tp_size": 16}, {"pp_size": 4}])
def test_plans_that_split_tensors_or_layers_are_refused(make, sizes):
    plan = ParallelPlan(ep_size=4, **sizes)
    with pytest.raises(ConfigError, match="Use --tp 1 --pp 1") as refused:
        make(plan, spec())
    assert f"tp_size={plan.tp_size}, pp_size={plan.pp_size}" in str(refused.value)


@pytest.mark.parametrize("make", [inference_config, autoep_config])
def test_a_model_without_experts_is_refused_with_the_way_to_make_some(make):
    dense = dataclasses.replace(spec(), moe_layers=(), num_experts=0)
    with pytest.raises(ConfigError, match="upcycle the model"):
        make(EP64, dense)


def test_the_table_of_presets_is_autoeps():
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    expected = {
        model_type: name
        for name, preset in PRESET_MODELS.items()
        for model_type in preset.hf_model_types
    }
    assert expected == AUTOEP_PRESETS


def test_families_without_a_preset_are_refused_with_those_that_have_one():
    message = "no preset for model_type='olmoe'; it has them for deepseek_v2, deepseek_v3"
    with pytest.raises(ConfigError, match=re.escape(message)):
        autoep_config(EP64, spec())


@pytest.mark.parametrize("folder", WITH_PRESET, ids=lambda folder: folder.name)
def test_autoep_parses_validates_and_finds_the_moe_layers_for_a_world_of_64(folder):
    from deepspeed.module_inject.auto_ep import AutoEP
    from deepspeed.module_inject.auto_ep_config import (
        AutoEPConfig,
        validate_autoep_config,
        validate_autoep_post_detection,
    )
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers import AutoConfig, AutoModelForCausalLM

    written = json.loads((folder / "ds_train_autoep.json").read_text())
    # AutoEP's parser ignores keys it does not know, so they are compared here.
    known = {field.name for field in dataclasses.fields(AutoEPConfig)}
    assert written["expert_parallel"].keys() <= known

    config = DeepSpeedConfig(written)
    assert config.bfloat16_config.enabled
    assert config.expert_parallel_config.autoep_size == 64
    validate_autoep_config(
        config.expert_parallel_config,
        world_size=64,
        pp_size=1,
        tp_size=1,
        sp_size=1,
        zero_stage=config.zero_optimization_stage,
    )
    hf_config = AutoConfig.for_model(**json.loads((folder / "config.json").read_text()))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf_config)
    found = AutoEP(model, config.expert_parallel_config).ep_parser()
    validate_autoep_post_detection(config.expert_parallel_config, found)
    expected = read_model_spec(folder / "config.json")
    assert [layer.moe_module_name for layer in found] == [
        f"model.layers.{layer}.mlp" for layer in expected.moe_layers
    ]
    assert {(layer.num_experts, layer.top_k) for layer in found} == {
        (expected.num_experts, expected.top_k)
    }


def test_autoep_refuses_a_size_that_does_not_fit_so_the_test_above_can_fail():
    from deepspeed.module_inject.auto_ep_config import parse_autoep_config, validate_autoep_config

    plan = ParallelPlan(ep_size=48)
    config = autoep_config(plan, spec("qwen3-30b-a3b-ep64"))["expert_parallel"]
    with pytest.raises(ValueError, match="48"):
        validate_autoep_config(parse_autoep_config(config), 64, 1, 1, 1)


@pytest.mark.parametrize(
    ("dtype", "section"), [("bfloat16", "bf16"), ("float16", "fp16"), ("float32", None)]
)
def test_training_precision_follows_the_dtype(dtype, section):
    of_dtype = dataclasses.replace(spec("qwen3-30b-a3b-ep64"), dtype=dtype)
    config = autoep_config(EP64, of_dtype)
    assert [name for name in ("bf16", "fp16") if name in config] == ([section] if section else [])
