"""megatron.args: values by family, what becomes of each field, refusals where Megatron differs.

That Megatron knows the names is tested in tests/megatron.
"""

import contextlib
import dataclasses
import json
import re

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ds_moe_ep.cli import main
from ds_moe_ep.config.megatron import MegatronOptions, megatron_args
from ds_moe_ep.config.megatron_fields import FIELDS, Mapped, Only, WithoutEffect
from ds_moe_ep.errors import ConfigError, ModelSpecError
from ds_moe_ep.model_spec import model_spec_from_config
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.launch import REPO

EP64 = ParallelPlan(ep_size=64)

LLAMA_LIKE = {
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "max_position_embeddings": 2048,
    "num_attention_heads": 8,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "vocab_size": 1000,
}
MIXTRAL = LLAMA_LIKE | {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "num_local_experts": 64,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}
QWEN2_MOE = LLAMA_LIKE | {
    "model_type": "qwen2_moe",
    "architectures": ["Qwen2MoeForCausalLM"],
    "decoder_sparse_step": 2,
    "mlp_only_layers": [],
    "moe_intermediate_size": 96,
    "norm_topk_prob": False,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 384,
}


def published(name):
    return json.loads((REPO / "configs" / name / "config.json").read_text())


OLMOE = published("olmoe-1b-7b-ep64")
QWEN3_MOE = published("qwen3-30b-a3b-ep64")
DEEPSEEK_V2_LITE = published("deepseek-v2-lite-ep64")
DEEPSEEK_V3 = published("deepseek-v3-ep64")
DEEPSEEK_V2 = DEEPSEEK_V2_LITE | {"q_lora_rank": 1536, "rope_scaling": None}
FAMILIES = [OLMOE, MIXTRAL, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3]


def text(config, plan=EP64, **options):
    spec = model_spec_from_config(config, source="config.json", name="model")
    return megatron_args(plan, spec, config, MegatronOptions(**options))


def arguments(config, plan=EP64, **options):
    """Return the arguments as the command line in the file's comment gives them to Megatron."""
    lines = text(config, plan, **options).splitlines()
    words = " ".join(line for line in lines if line[0] != "#").split()
    pairs = {}
    for word in words:
        if word.startswith("--"):
            assert word not in pairs
            pairs[word] = True
            last = word
        else:
            pairs[last] = word if pairs[last] is True else f"{pairs[last]} {word}"
    return pairs


def refusal(config):
    with pytest.raises(ConfigError) as refused:
        text(config)
    return str(refused.value)


def test_olmoe_in_full():
    lines = text(OLMOE).splitlines()
    assert [line for line in lines if line[0] != "#"] == [
        "--tensor-model-parallel-size 1",
        "--pipeline-model-parallel-size 1",
        "--expert-model-parallel-size 64",
        "--expert-tensor-parallel-size 1",
        "--num-layers 16",
        "--hidden-size 2048",
        "--ffn-hidden-size 1024",
        "--num-attention-heads 16",
        "--kv-channels 128",
        "--padded-vocab-size 50304",
        "--max-position-embeddings 4096",
        "--seq-length 4096",
        "--micro-batch-size 1",
        "--normalization RMSNorm",
        "--norm-epsilon 1e-05",
        "--position-embedding-type rope",
        "--rotary-base 10000",
        "--swiglu",
        "--disable-bias-linear",
        "--untie-embeddings-and-output-weights",
        "--attention-dropout 0.0",
        "--hidden-dropout 0.0",
        "--num-experts 64",
        "--moe-router-topk 8",
        "--moe-ffn-hidden-size 1024",
        "--moe-layer-freq 1",
        "--moe-token-dispatcher-type alltoall",
        "--moe-router-load-balancing-type none",
        "--qk-layernorm",
        "--moe-router-pre-softmax",
        "--transformer-impl transformer_engine",
        "--spec ds_moe_ep.megatron.layer_specs olmoe_layers",
        "--bf16",
    ]


def test_the_file_says_what_the_plan_is_in_megatrons_words():
    assert "# EP64 TP1 PP1 DP1 is, in Megatron's words: expert model parallel 64, data" in text(
        OLMOE
    )
    plan = ParallelPlan(ep_size=8, tp_size=2, pp_size=2, dp_size=4)
    said = text(QWEN3_MOE, plan).replace("\n# ", " ")
    assert "expert model parallel 8, data parallel 32 (replicas of the dense weights" in said
    assert "expert data parallel 4 (copies of each expert)" in said
    assert "ds-moe-ep megatron check --args megatron.args --world 128" in said


_OWN_LAYERS = "ds_moe_ep.megatron.layer_specs"


@pytest.mark.parametrize(
    ("config", "transformer_impl", "layers"),
    [
        (OLMOE, "transformer_engine", f"{_OWN_LAYERS} olmoe_layers"),
        (OLMOE, "local", f"{_OWN_LAYERS} olmoe_layers"),
        (QWEN3_MOE, "local", None),
        (DEEPSEEK_V3, "transformer_engine", None),
        (DEEPSEEK_V3, "local", f"{_OWN_LAYERS} mla_layers"),
        (DEEPSEEK_V2_LITE, "transformer_engine", f"{_OWN_LAYERS} mla_layers"),
    ],
)
def test_layers_of_our_own_where_megatrons_differ(config, transformer_impl, layers):
    found = arguments(config, transformer_impl=transformer_impl)
    assert found.get("--spec") == layers
    assert ("--spec names layers of this package" in text(config)) == (
        "--spec" in arguments(config)
    )


def test_local_layers_and_grouped_experts():
    fusions = {f"--no-{name}" for name in ("persist-layer-norm", "rope-fusion")}
    assert not fusions & arguments(MIXTRAL).keys()
    assert fusions <= arguments(MIXTRAL, transformer_impl="local").keys()
    assert arguments(MIXTRAL, transformer_impl="local")["--transformer-impl"] == "local"
    assert "--moe-grouped-gemm" not in arguments(MIXTRAL)
    assert arguments(MIXTRAL, grouped_gemm=True)["--moe-grouped-gemm"] is True
    with pytest.raises(ConfigError, match="compute one expert after the other"):
        MegatronOptions("local", grouped_gemm=True)


@pytest.mark.parametrize("prefix", ["--megatron-", "--"])
def test_the_options_of_the_command(prefix, tmp_path, capsys):
    model = REPO / "configs" / "qwen3-30b-a3b-ep64" / "config.json"
    command = ["config", "--model", str(model), "--num-gpus", "64", "--out", str(tmp_path)]
    assert main([*command, f"{prefix}transformer-impl", "local"]) == 0
    assert "--transformer-impl local\n" in (tmp_path / "megatron.args").read_text()
    assert main([*command, f"{prefix}grouped-gemm"]) == 0
    assert "--moe-grouped-gemm\n" in (tmp_path / "megatron.args").read_text()
    both = [f"{prefix}grouped-gemm", f"{prefix}transformer-impl", "local"]
    assert main([*command, *both]) == 2
    assert "ConfigError: --megatron-grouped-gemm with" in capsys.readouterr().err


def class_of(model_type):
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


@pytest.mark.parametrize("model_type", FIELDS)
def test_every_field_of_transformers_own_class_is_known(model_type):
    known, theirs = FIELDS[model_type].keys(), class_of(model_type)
    assert not theirs().to_dict().keys() - known
    assert not {field.name for field in dataclasses.fields(theirs)} - known
    assert not theirs.attribute_map.keys() - known  # other names that it takes for some
    assert {config["model_type"] for config in FAMILIES} == FIELDS.keys()


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_a_field_that_is_not_there_is_what_transformers_takes_for_it_or_is_refused(config):
    defaults = class_of(config["model_type"])().to_dict()
    fates, taken = FIELDS[config["model_type"]], 0
    for name in config.keys() & defaults.keys():
        if isinstance(fates[name], Mapped | Only) and defaults[name] is not None:
            absent = {key: value for key, value in config.items() if key != name}
            with contextlib.suppress(ConfigError, ModelSpecError):
                assert arguments(absent) == arguments(absent | {name: defaults[name]}), name
                taken += 1
    assert taken >= 3


JSON_VALUES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
ALL_NAMES = st.sampled_from(sorted({name for fates in FIELDS.values() for name in fates}))


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
@given(name=st.text(min_size=1) | ALL_NAMES, value=JSON_VALUES)
def test_any_other_field_is_refused_by_name(config, name, value):
    assume(name not in FIELDS[config["model_type"]])
    with pytest.raises((ConfigError, ModelSpecError)) as refused:
        text(config | {name: value})
    assert f"{name}={value!r}" in str(refused.value)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
@given(name=st.text(min_size=1) | st.sampled_from(["truncate", "short_factor"]), value=JSON_VALUES)
def test_any_other_rope_parameter_is_refused_by_name(config, name, value):
    rope = {"rope_theta": 10000.0, "rope_type": "default"}
    assume(name not in {*rope, "type"})
    said = refusal(config | {"rope_parameters": rope | {name: value}})
    assert said.startswith(f"{name}={value!r} among the rope parameters in config.json")


def another(value):
    """Return a value of the same type, which a model could have."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, float):
        return value + 0.5
    return 2 * value


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_a_mapped_field_changes_the_argument_that_it_names_or_is_refused(config):
    if config["model_type"] == "deepseek_v2":
        config = config | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 6}
    config = config | {"attention_dropout": 0.0}
    fates = FIELDS[config["model_type"]]
    scalars = {
        name: value for name, value in config.items() if isinstance(value, bool | int | float)
    }
    scalars = {name: value for name, value in scalars.items() if isinstance(fates[name], Mapped)}
    assert len(scalars) > 10
    before, changes = arguments(config), {}
    for name, value in scalars.items():
        with contextlib.suppress(ConfigError, ModelSpecError):
            after = arguments(config | {name: another(value)})
            changes[name] = {key for key, _ in before.items() ^ after.items()}
    assert len(changes) > 5
    assert not {name for name, changed in changes.items() if fates[name].argument not in changed}


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_a_field_without_effect_changes_nothing(config):
    fates = FIELDS[config["model_type"]]
    names = [name for name, fate in fates.items() if isinstance(fate, WithoutEffect)]
    names = [name for name in names if name not in ("model_type", "architectures")]
    assert text(config | dict.fromkeys(names, 7)) == text(config)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_a_field_with_one_possible_value_is_refused_with_another(config):
    for name, fate in FIELDS[config["model_type"]].items():
        if isinstance(fate, Only):
            with pytest.raises((ConfigError, ModelSpecError), match=name):
                text(config | {name: 12345})


def test_a_field_that_nobody_knows_is_refused():
    assert refusal(OLMOE | {"moe_gate_temperature": 0.5}).startswith(
        "moe_gate_temperature=0.5 in config.json: what it means for a olmoe model"
    )
    assert "Did you mean rms_norm_eps?" in refusal(OLMOE | {"rms_norm_epss": 1})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (MIXTRAL, {"--moe-router-pre-softmax": None, "--num-query-groups": "2", "--fp16": True}),
        (MIXTRAL, {"--moe-ffn-hidden-size": "1024", "--qk-layernorm": None, "--bf16": None}),
        (MIXTRAL | {"torch_dtype": "float32"}, {"--fp16": None, "--bf16": None}),
        (MIXTRAL | {"tie_word_embeddings": True}, {"--untie-embeddings-and-output-weights": None}),
        (QWEN2_MOE, {"--moe-shared-expert-intermediate-size": "384", "--add-qkv-bias": True}),
        (QWEN2_MOE, {"--moe-shared-expert-gate": True, "--moe-layer-freq": "[0,1,0,1]"}),
        (QWEN2_MOE | {"qkv_bias": False}, {"--add-qkv-bias": None}),
        (QWEN3_MOE, {"--qk-layernorm": True, "--kv-channels": "128", "--rotary-base": "1000000"}),
        (QWEN3_MOE, {"--moe-router-pre-softmax": None, "--num-query-groups": "4"}),
        (QWEN3_MOE | {"norm_topk_prob": False}, {"--moe-router-pre-softmax": True}),
        (DEEPSEEK_V2, {"--moe-router-pre-softmax": True, "--rope-type": "rope"}),
        (DEEPSEEK_V2, {"--moe-router-num-groups": None, "--moe-router-topk-scaling-factor": None}),
        (DEEPSEEK_V3, {"--moe-router-score-function": "sigmoid", "--moe-router-num-groups": "8"}),
        (DEEPSEEK_V3, {"--moe-router-group-topk": "4", "--moe-router-enable-expert-bias": True}),
        (DEEPSEEK_V3, {"--moe-router-topk-scaling-factor": "2.5", "--kv-channels": None}),
        (DEEPSEEK_V3, {"--moe-layer-freq": "([0]*3+[1]*58)", "--q-lora-rank": "1536"}),
        (DEEPSEEK_V3, {"--qk-head-dim": "128", "--qk-pos-emb-head-dim": "64"}),
        (DEEPSEEK_V3, {"--rope-type": "yarn", "--rotary-scaling-factor": "40", "--mscale": "1.0"}),
        (DEEPSEEK_V3, {"--moe-shared-expert-intermediate-size": "2048"}),
        (DEEPSEEK_V2_LITE, {"--q-lora-rank": None, "--mscale": "0.707", "--rope-type": "yarn"}),
        (DEEPSEEK_V3 | {"rope_scaling": None}, {"--rope-type": "rope", "--mscale": None}),
        (DEEPSEEK_V3 | {"n_group": 1, "topk_group": 1}, {"--moe-router-num-groups": None}),
    ],
)
def test_values_by_family(config, expected):
    found = arguments(config)
    assert {name: found.get(name) for name in expected} == expected


def test_the_layer_pattern_is_what_megatron_evaluates():
    assert eval(arguments(DEEPSEEK_V3)["--moe-layer-freq"]) == [0] * 3 + [1] * 58  # noqa: S307
    assert eval(arguments(QWEN2_MOE)["--moe-layer-freq"]) == [0, 1, 0, 1]  # noqa: S307


def test_rope_parameters_of_transformers_5_are_read_too():
    config = {name: value for name, value in OLMOE.items() if not name.startswith("rope_")}
    config["rope_parameters"] = {"rope_theta": 500000.0, "rope_type": "default"}
    assert arguments(config)["--rotary-base"] == "500000"


def test_a_plan_that_splits_tensors_and_layers():
    found = arguments(QWEN3_MOE, ParallelPlan(ep_size=8, tp_size=4, pp_size=2))
    assert found["--tensor-model-parallel-size"] == found["--expert-tensor-parallel-size"] == "4"
    assert found["--pipeline-model-parallel-size"] == "2"
    assert found["--sequence-parallel"] is True
    assert "--sequence-parallel" not in arguments(QWEN3_MOE)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (published("glm-4.7-flash-ep64"), "model_type='glm4_moe_lite' has no mapping to Megatron"),
        (published("ernie-4.5-21b-a3b-ep64"), "there is one for deepseek_v2, deepseek_v3, mixtral"),
        (OLMOE | {"clip_qkv": 8.0}, "clip_qkv=8.0 in config.json: Megatron computes this family"),
        (OLMOE | {"head_dim": 64}, "head_dim=64 in config.json: Megatron computes this family wit"),
        (OLMOE | {"rope_parameters": {"rope_theta": 1, "truncate": True}}, "truncate=True among"),
        (OLMOE | {"rope_parameters": [1]}, "rope parameters [1] in config.json"),
        (DEEPSEEK_V3 | {"rms_norm_eps": 1e-5}, "rms_norm_eps=1e-05 in config.json"),
        (DEEPSEEK_V3 | {"num_key_value_heads": 64}, "num_key_value_heads=64 in config.json"),
        (QWEN2_MOE | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=["),
        (OLMOE | {"hidden_act": "gelu"}, "hidden_act='gelu'"),
        (OLMOE | {"attention_bias": True}, "attention_bias=True"),
        (OLMOE | {"rope_theta": 10000.5}, "rope_theta=10000.5: Megatron's --rotary-base takes"),
        (OLMOE | {"rms_norm_eps": "1e-5; x"}, "rms_norm_eps='1e-5; x' in config.json: Megatron ne"),
        (OLMOE | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling of type 'line"),
        (QWEN3_MOE | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        (QWEN3_MOE | {"use_sliding_window": True}, "use_sliding_window=True"),
        (QWEN3_MOE | {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with normalised weights"),
        (MIXTRAL | {"num_experts_per_tok": 1}, "num_experts_per_tok=1 with normalised weights"),
        (MIXTRAL | {"sliding_window": 4096}, "sliding_window=4096"),
        (
            DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            "topk_group=3 with num_experts_per_tok=6: Megatron would rank the groups by their bes",
        ),
        (DEEPSEEK_V2 | {"topk_method": "noaux_tc"}, "topk_method='noaux_tc' in config.json: Hugg"),
        (DEEPSEEK_V3 | {"topk_group": 2}, "would rank the groups by their best 4 experts"),
        (DEEPSEEK_V3 | {"norm_topk_prob": False}, "norm_topk_prob=False"),
        (DEEPSEEK_V3 | {"rope_interleave": False}, "rope_interleave=False"),
        (
            DEEPSEEK_V3 | {"rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 16}},
            "beta_fast=16",
        ),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(config, message):
    assert re.search(re.escape(message), refusal(config))


@pytest.mark.parametrize(
    ("config", "sizes", "message"),
    [
        (DEEPSEEK_V3, {"pp_size": 2}, "pp_size=2 does not divide num_layers=61: Megatron gives"),
        (MIXTRAL | {"vocab_size": 1001}, {"tp_size": 2}, "tp_size=2 does not divide vocab_size=1"),
        (OLMOE, {"tp_size": 2}, "tp_size=2: OLMoE's norms of q and k span all heads"),
    ],
)
def test_splits_that_megatron_cannot_make_are_refused(config, sizes, message):
    with pytest.raises(ConfigError, match=message):
        text(config, ParallelPlan(ep_size=32, **sizes))


def test_local_layers_cannot_split_tensors():
    plan = ParallelPlan(ep_size=32, tp_size=2)
    with pytest.raises(ConfigError, match="tp_size=2 with --megatron-transformer-impl local"):
        text(MIXTRAL, plan, transformer_impl="local")
    assert arguments(MIXTRAL, plan)["--sequence-parallel"] is True


def test_groups_that_megatron_ranks_alike_are_accepted():
    config = DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 6}
    assert arguments(config)["--moe-router-group-topk"] == "6"
