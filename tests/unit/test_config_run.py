"""load_run_config: what it takes, and what it says about what it does not take."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.config.bundle import write_bundle
from ds_moe_ep.config.run import UNSUPPORTED_SETTINGS, InferenceSettings, load_run_config
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import local_cluster
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan, make_plan
from tests.helpers.launch import REPO

OLMOE = REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json"


@pytest.fixture
def folder(tmp_path):
    spec, cluster = read_model_spec(OLMOE), local_cluster(8)
    write_bundle(OLMOE, cluster, make_plan(cluster, spec, ep_size=4, dp_size=2), spec, tmp_path)
    return tmp_path


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def sizes(**changes):
    planned = {"ep_size": 4, "tp_size": 1, "pp_size": 1, "dp_size": 2}
    return {**planned, "world_size": 8, "dense_dp_size": 8, **changes}


def settings(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_folder_gives_the_plan_and_the_inference_config(folder):
    run = load_run_config(folder)
    assert run.source == folder
    assert run.plan == ParallelPlan(ep_size=4, dp_size=2)
    assert (run.ep_size, run.num_experts, run.dtype) == (4, 64, "bfloat16")
    assert run.inference == {
        "dtype": "bfloat16",
        "max_out_tokens": 4096,
        "moe": {"ep_size": 4, "moe_experts": [64]},
        "replace_with_kernel_inject": False,
        "tensor_parallel": {"tp_size": 1},
    }


def test_bare_json_leaves_open_what_it_does_not_say(tmp_path):
    run = load_run_config(settings(tmp_path, {}))
    assert (run.plan, run.ep_size, run.num_experts, run.dtype) == (None, None, None, None)
    assert run.inference == {}


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16", "bfloat", "torch.bfloat16"])
def test_bare_json_takes_deepspeeds_spellings(tmp_path, spelling):
    content = {"dtype": spelling, "tp": {"tp_size": 1}, "max_tokens": 7, "kernel_inject": False}
    run = load_run_config(settings(tmp_path, content))
    assert run.inference == {
        "dtype": "bfloat16",
        "tensor_parallel": {"tp_size": 1},
        "max_out_tokens": 7,
        "replace_with_kernel_inject": False,
    }


def test_what_is_read_back_is_taken_by_deepspeed(folder):
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    config = DeepSpeedInferenceConfig(**load_run_config(folder).inference)
    assert (config.moe.ep_size, config.moe.moe_experts) == (4, [64])


def test_every_setting_of_deepspeed_is_either_supported_or_refused_as_deepspeeds():
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    def names(model):
        fields = model.model_fields
        return set(fields) | {field.alias for field in fields.values() if field.alias}

    assert names(InferenceSettings) | UNSUPPORTED_SETTINGS == names(DeepSpeedInferenceConfig)
    assert not names(InferenceSettings) & UNSUPPORTED_SETTINGS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dtyp": "bf16"}, "unknown key 'dtyp' (did you mean 'dtype'?)"),
        ({"moe": {"ep_sise": 4}}, "unknown key 'moe.ep_sise' (did you mean 'ep_size'?)"),
        ({"tp": {"size": 1}}, "unknown key 'tp.size' (did you mean 'tp_size'?)"),
        ({"zzz": 1}, "unknown key 'zzz' (known here: dtype, kernel_inject, max_out_tokens, "),
        ({"dtype": "int8"}, "dtype='int8' is not a type that can be run. Use one of bfloat16, "),
        ({"dtype": 16}, "dtype=16: Input should be a valid string"),
        ({"moe": {"ep_size": 0}}, "moe.ep_size=0: Input should be greater than 0"),
        ({"moe": {"ep_size": "4"}}, "moe.ep_size='4': Input should be a valid integer"),
        ({"moe": True}, "moe=True: Input should be a valid dictionary"),
        ({"moe": {"num_experts": [8, 64]}}, "every MoE layer must have the same number of experts"),
        ({"tensor_parallel": {"tp_size": 2}}, "tensor_parallel.tp_size=2: Input should be 1"),
        ({"kernel_inject": True}, "kernel_inject=True: Input should be False"),
        ({"enable_cuda_graph": True, "zero": {}}, "enable_cuda_graph, zero: DeepSpeed has this"),
        (
            {"max_tokens": 5, "max_out_tokens": 6},
            "max_out_tokens is there under both of its names; keep one",
        ),
        ('{"dtype": "bf16", "dtype": "fp32"}', "the key 'dtype' is there twice; keep one"),
        ("[1]", "a JSON object ({...}) is needed, found [1]"),
        ('{\n  "dtype": bf16\n}', "ds.json:2:12: not valid JSON (Expecting value)"),
        ("", "ds.json:1:1: not valid JSON"),
    ],
)
def test_refusals_of_a_bare_json_name_the_file_and_the_fault(tmp_path, content, message):
    path = settings(tmp_path, content)
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        load_run_config(path)
    assert str(refused.value).startswith(str(path))


KEYS = st.sampled_from(["dtype", "moe", "tp", "ep_size", "num_experts", "tp_size", "zero"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("bf16"),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS | st.text(), inner),
)


@given(content=JSON)
def test_any_json_is_either_taken_by_deepspeed_too_or_refused_as_configuration(
    tmp_path_factory, content
):
    from deepspeed.inference.config import DeepSpeedInferenceConfig

    path = tmp_path_factory.mktemp("any") / "ds.json"
    path.write_text(json.dumps(content))
    try:
        run = load_run_config(path)
    except ConfigError:
        return
    DeepSpeedInferenceConfig(**{"dtype": "float32", **run.inference})


def test_several_faults_are_told_together(tmp_path):
    with pytest.raises(ConfigError) as refused:
        load_run_config(settings(tmp_path, {"dtyp": "bf16", "max_tokens": 0}))
    assert "'dtyp'" in str(refused.value) and "max_tokens=0" in str(refused.value)


def test_unreadable_files(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read .No such file"):
        load_run_config(tmp_path / "none.json")
    (tmp_path / "latin.json").write_bytes(b'{"dtype": "\xe9"}')
    with pytest.raises(ConfigError, match=r"not UTF-8 text .byte 11"):
        load_run_config(tmp_path / "latin.json")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="recursion"):
        load_run_config(tmp_path / "deep.json")
    (tmp_path / "long.json").write_text('{"max_tokens": ' + "1" * 5000 + "}")
    with pytest.raises(ConfigError, match="long.json"):
        load_run_config(tmp_path / "long.json")


@pytest.mark.parametrize("missing", ["plan.json", "ds_inference.json"])
def test_folder_that_is_not_whole_is_refused_with_the_command(folder, missing):
    (folder / missing).unlink()
    with pytest.raises(ConfigError) as refused:
        load_run_config(folder)
    assert str(refused.value).startswith(f"{folder}: no {missing} ")
    assert f"ds-moe-ep config --model M --hostfile H --out {folder}" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "ds_inference.json",
            {"moe": {"ep_size": 8, "num_experts": [64]}},
            "ep_size=8, but plan.json plans EP4 TP1 PP1 DP2 for ep_size=4",
        ),
        ("ds_inference.json", {"moe": {"ep_size": 4, "num_experts": [60]}}, "num_experts=60, but"),
        ("ds_inference.json", {"moe": {}}, "ep_size=None, but"),
        (
            "plan.json",
            {"plan": sizes(dp_size=1)},
            "world_size=8, but plan.json plans EP4 TP1 PP1 DP1 for world_size=4",
        ),
        (
            "plan.json",
            {"plan": sizes(tp_size=2, dp_size=1)},
            "tp_size=1, but plan.json plans EP4 TP2 PP1 DP1 for tp_size=2",
        ),
        ("plan.json", {"version": 2}, "plan.json: version=2: Input should be 1"),
        ("plan.json", {"hostz": []}, "plan.json: unknown key 'hostz' (did you mean 'hosts'?)"),
    ],
)
def test_files_that_disagree_or_were_edited_wrongly_are_refused(folder, name, changes, message):
    edit(folder / name, **changes)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_run_config(folder)


def test_missing_keys_of_plan_json_are_named(folder):
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ConfigError, match="plan.json: version is missing; plan is missing"):
        load_run_config(folder)
