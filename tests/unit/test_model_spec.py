"""Model specs: parameter counts equal those of the model transformers builds, refusals name fields.

The reference is transformers on the meta device, which allocates nothing: a model of 671 billion
parameters is built as fast as a tiny one.
"""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from ds_moe_ep.errors import ModelSpecError
from ds_moe_ep.model_families import FAMILIES, UNSUPPORTED
from ds_moe_ep.model_spec import MLASpec, ModelSpec, model_spec_from_config, read_model_spec
from tests.helpers.launch import REPO

_COMMITTED_CONFIGS = sorted((REPO / "configs").glob("*/config.json"))

_TINY = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 101,
    "max_position_embeddings": 33,
    "pad_token_id": None,
}
_TINY_MHA = {name: value for name, value in _TINY.items() if name != "num_key_value_heads"}
_TINY_MOE = {**_TINY, "moe_intermediate_size": 24, "num_experts_per_tok": 3}
_MLA = {"kv_lora_rank": 13, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6, "v_head_dim": 14}
_TINY_MLA = {**_TINY_MOE, **_MLA, "num_key_value_heads": 6, "q_lora_rank": 17}
_BIASES = {"attention_bias": True}
_TIED = {"tie_word_embeddings": True}
_UNTIED = {"tie_word_embeddings": False}

# Small configs that together switch every part a family may have on and off.
_SMALL = [
    ("olmoe", {**_TINY_MOE, "num_experts": 7}),
    ("olmoe", {**_TINY_MOE, "num_experts": 8, **_BIASES, **_TIED, "num_key_value_heads": 6}),
    ("mixtral", {**_TINY_MOE, "num_local_experts": 4}),
    ("mixtral", {**_TINY_MOE, "num_local_experts": 4, "head_dim": 10, **_TIED}),
    ("qwen2_moe", {**_TINY_MOE, "num_experts": 6, "shared_expert_intermediate_size": 20}),
    (
        "qwen2_moe",
        {
            **_TINY_MOE,
            "num_experts": 6,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "qkv_bias": False,
        },
    ),
    ("qwen3_moe", {**_TINY_MOE, "num_experts": 6}),
    (
        "qwen3_moe",
        {**_TINY_MOE, "num_experts": 6, "head_dim": 10, "mlp_only_layers": [0, 3], **_BIASES},
    ),
    ("deepseek_v2", {**_TINY_MLA, "n_routed_experts": 6, "first_k_dense_replace": 1}),
    (
        "deepseek_v2",
        {
            **_TINY_MLA,
            **_BIASES,
            "n_routed_experts": 6,
            "q_lora_rank": None,
            "n_shared_experts": 3,
            "mlp_bias": True,
            "first_k_dense_replace": 2,
        },
    ),
    ("deepseek_v3", {**_TINY_MLA, "n_routed_experts": 16, "num_experts_per_tok": 4}),
    (
        "deepseek_v3",
        {**_TINY_MLA, **_BIASES, "n_routed_experts": 16, "first_k_dense_replace": 0, **_TIED},
    ),
    ("ernie4_5_moe", {**_TINY_MOE, "moe_num_experts": 6, "moe_k": 2}),
    (
        "ernie4_5_moe",
        {
            **_TINY_MOE,
            **_UNTIED,
            "use_bias": True,
            "moe_num_experts": 6,
            "moe_num_shared_experts": 0,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": 3,
            "moe_layer_interval": 2,
        },
    ),
    ("glm4_moe", {**_TINY_MOE, "n_routed_experts": 6}),
    (
        "glm4_moe",
        {**_TINY_MOE, **_BIASES, "n_routed_experts": 6, "head_dim": 10, "use_qk_norm": True},
    ),
    ("glm4_moe_lite", {**_TINY_MLA, "n_routed_experts": 6}),
    (
        "glm4_moe_lite",
        {
            **_TINY_MLA,
            **_BIASES,
            "n_routed_experts": 6,
            "q_lora_rank": None,
            "mlp_layer_types": ["sparse", "dense", "sparse", "sparse", "dense"],
        },
    ),
    ("gpt_oss", {**_TINY_MOE, "num_local_experts": 6}),
    ("gpt_oss", {**_TINY_MOE, "num_local_experts": 6, "head_dim": 10, "attention_bias": False}),
    ("granitemoe", {**_TINY_MOE, "num_local_experts": 6}),
    ("granitemoe", {**_TINY_MOE, "num_local_experts": 6, **_BIASES, **_TIED}),
    ("phimoe", {**_TINY_MOE, "num_local_experts": 6}),
    ("phimoe", {**_TINY_MOE, "num_local_experts": 6, **_BIASES, "lm_head_bias": True}),
    ("llama", {**_TINY}),
    ("llama", {**_TINY, **_BIASES, **_TIED, "mlp_bias": True, "head_dim": 10}),
    ("mistral", {**_TINY, "head_dim": 10}),
    ("qwen2", {**_TINY, **_TIED}),
    ("qwen3", {**_TINY, **_BIASES}),
    ("gemma", {**_TINY, "head_dim": 10}),
    ("gemma2", {**_TINY, **_BIASES}),
    ("gemma3_text", {**_TINY, "head_dim": 10}),
    ("olmo2", {**_TINY}),
    ("olmo2", {**_TINY, **_BIASES}),
    ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_positions": 33, "vocab_size": 101}),
    ("gpt2", {"n_embd": 48, "n_layer": 3, "n_head": 6, "n_inner": 50, **_UNTIED}),
    ("gpt_neox", {**_TINY_MHA}),
    ("gpt_neox", {**_TINY_MHA, "attention_bias": False, **_TIED}),
    ("opt", {**_TINY_MHA, "ffn_dim": 40}),
    (
        "opt",
        {
            **_TINY_MHA,
            **_UNTIED,
            "ffn_dim": 40,
            "word_embed_proj_dim": 20,
            "do_layer_norm_before": False,
            "enable_bias": False,
        },
    ),
    ("opt", {**_TINY_MHA, "ffn_dim": 40, "layer_norm_elementwise_affine": False}),
    ("phi", {**_TINY}),
    ("phi", {**_TINY, "qk_layernorm": True, **_TIED}),
    ("phi3", {**_TINY}),
]

# What the config classes default to is the shape of a real model; here is what that leaves out.
_FULL = {
    "olmoe": {"intermediate_size": 1024},
    "deepseek_v2": {"num_experts_per_tok": 6, "first_k_dense_replace": 1},
    "glm4_moe": {"head_dim": 128, "attention_bias": True},
}


def _saved(config: PretrainedConfig, folder: Path) -> ModelSpec:
    """The spec of a config as it is read from the file that transformers writes."""
    config.save_pretrained(folder)
    return read_model_spec(folder)


def _num_params_of_transformers(config: PretrainedConfig) -> tuple[int, int]:
    """Dense and routed-expert parameters of the model that transformers builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = [(".experts." in name, p.numel()) for name, p in model.named_parameters()]
    return sum(n for routed, n in sizes if not routed), sum(n for routed, n in sizes if routed)


def _moe_layers_of_transformers(config: PretrainedConfig) -> tuple[int, ...]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layers = {
        int(name.split(".layers.")[1].split(".")[0])
        for name, _ in model.named_parameters()
        if ".experts." in name
    }
    return tuple(sorted(layers))


# Counts


@pytest.mark.parametrize(("model_type", "settings"), _SMALL)
def test_small_models_count_as_in_transformers(model_type, settings, tmp_path):
    config = AutoConfig.for_model(model_type, **settings)
    spec = _saved(config, tmp_path)

    assert (spec.num_dense_params, spec.num_expert_params) == _num_params_of_transformers(config)
    assert spec.moe_layers == _moe_layers_of_transformers(config)
    assert spec.params_are_exact


def test_every_family_is_tried_small():
    assert {model_type for model_type, _ in _SMALL} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_full_size_models_count_as_in_transformers(model_type, tmp_path):
    config = AutoConfig.for_model(model_type, **_FULL.get(model_type, {}))
    spec = _saved(config, tmp_path)

    assert (spec.num_dense_params, spec.num_expert_params) == _num_params_of_transformers(config)


@pytest.mark.parametrize("path", _COMMITTED_CONFIGS, ids=lambda path: path.parent.name)
def test_committed_configs_count_as_in_transformers(path):
    spec = read_model_spec(path)

    counts = _num_params_of_transformers(AutoConfig.from_pretrained(path.parent))

    assert (spec.num_dense_params, spec.num_expert_params) == counts


# The OLMoE-1B-7B of the paper (arXiv 2409.02060), as older transformers wrote its config.json.
_OLMOE = {
    "architectures": ["OlmoeForCausalLM"],
    "attention_bias": False,
    "clip_qkv": None,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "model_type": "olmoe",
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 50304,
}


def test_olmoe_1b_7b():
    spec = model_spec_from_config(_OLMOE, source="config.json", name="OLMoE-1B-7B")

    assert spec.num_params == 6_919_161_856
    assert spec.num_dense_params == 476_710_912
    assert spec.num_expert_params == 64 * 100_663_296
    assert spec.num_params_per_expert == 3 * 2048 * 1024
    assert (spec.num_layers, spec.moe_layers, spec.is_moe) == (16, tuple(range(16)), True)
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size) == (64, 8, 1024)
    assert (spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim) == (16, 16, 128)
    assert (spec.num_shared_experts, spec.shared_expert_intermediate_size, spec.mla) == (0, 0, None)
    assert (spec.dtype, spec.param_bytes, spec.architecture) == ("bfloat16", 2, "OlmoeForCausalLM")
    assert (spec.vocab_size, spec.max_position_embeddings) == (50304, 4096)
    assert not spec.tie_word_embeddings


def test_deepseek_has_mla_shared_experts_and_dense_first_layers(tmp_path):
    spec = _saved(AutoConfig.for_model("deepseek_v3"), tmp_path)

    assert spec.mla == MLASpec(1536, 512, 128, 64, 128)
    assert spec.head_dim == 192
    assert spec.moe_layers == tuple(range(3, 61))
    assert (spec.num_shared_experts, spec.shared_expert_intermediate_size) == (1, 2048)
    assert (spec.intermediate_size, spec.moe_intermediate_size) == (18432, 2048)


def test_a_dense_model_has_no_experts(tmp_path):
    spec = _saved(AutoConfig.for_model("llama"), tmp_path)

    assert not spec.is_moe
    assert spec.moe_layers == ()
    assert (spec.num_experts, spec.top_k, spec.moe_intermediate_size) == (0, 0, 0)
    assert (spec.num_params_per_expert, spec.num_expert_params) == (0, 0)


@pytest.mark.parametrize(
    ("field", "dtype", "num_bytes"),
    [("dtype", "float16", 2), ("torch_dtype", "float32", 4), ("dtype", None, 4)],
)
def test_dtype_is_read_under_its_new_and_old_name(field, dtype, num_bytes):
    config = {name: value for name, value in _OLMOE.items() if name != "torch_dtype"}
    spec = model_spec_from_config({**config, field: dtype}, source="config.json", name="m")
    assert (spec.dtype, spec.param_bytes) == (dtype or "float32", num_bytes)


def test_reads_a_folder_and_a_bare_file_alike(tmp_path):
    folder = tmp_path / "OLMoE"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(_OLMOE))

    assert read_model_spec(folder) == read_model_spec(str(folder / "config.json"))
    assert read_model_spec(folder).name == "OLMoE"


# Families that are not in the table


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("granite", _TINY),
        ("smollm3", _TINY),
        ("dots1", {**_TINY_MOE, "n_routed_experts": 6, "n_shared_experts": 1}),
        ("flex_olmo", {**_TINY, "num_experts": 6, "num_experts_per_tok": 3}),
    ],
)
def test_an_unknown_family_is_read_by_the_usual_fields(model_type, settings, tmp_path):
    config = AutoConfig.for_model(model_type, **settings)
    spec = _saved(config, tmp_path)

    assert not spec.params_are_exact
    assert (spec.hidden_size, spec.num_layers, spec.vocab_size) == (48, 5, 101)
    assert spec.moe_layers == _moe_layers_of_transformers(config)
    dense, routed = _num_params_of_transformers(config)
    assert spec.num_expert_params == routed
    assert spec.num_dense_params == pytest.approx(dense, rel=0.05)


def test_an_unknown_family_with_latent_attention_is_recognised():
    config = {**_TINY_MLA, "model_type": "new_mla", "n_routed_experts": 6}
    spec = model_spec_from_config(config, source="config.json", name="m")
    assert spec.mla == MLASpec(17, 13, 10, 6, 14)
    assert (spec.num_experts, spec.top_k) == (6, 3)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "t5", "d_model": 512},
            "no field hidden_size or n_embd (model_type 't5'): the family is not known",
        ),
        (
            {"model_type": "gemma3", "text_config": {"hidden_size": 8}},
            "no field num_hidden_layers or n_layer (model_type 'gemma3')",
        ),
    ],
)
def test_an_unknown_family_without_them_is_refused(config, message):
    with pytest.raises(ModelSpecError) as refused:
        model_spec_from_config(config, source="config.json", name="m")
    assert message in str(refused.value)


def test_the_language_model_of_a_multimodal_model():
    text = {**_TINY_MOE, "model_type": "qwen3_moe", "num_experts": 6, "head_dim": 10}
    config = {
        "model_type": "some_vl",
        "architectures": ["SomeVLForConditionalGeneration"],
        "text_config": text,
        "vision_config": {"hidden_size": 1280},
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    spec = model_spec_from_config(config, source="config.json", name="m")
    alone = model_spec_from_config(
        {**text, "tie_word_embeddings": True}, source="config.json", name="m"
    )
    assert (spec.model_type, spec.architecture) == ("some_vl", "SomeVLForConditionalGeneration")
    assert (spec.hidden_size, spec.num_experts, spec.top_k) == (48, 6, 3)
    assert (spec.tie_word_embeddings, spec.dtype) == (True, "bfloat16")
    assert spec.num_params == alone.num_params
    assert (spec.params_are_exact, alone.params_are_exact) == (False, True)


def test_layers_of_several_kinds():
    config = {**_TINY_MOE, "model_type": "nemotron_h", "n_routed_experts": 6}
    del config["num_hidden_layers"]
    blocks = ["linear_attention", "moe", "full_attention", "mlp", "moe"]
    for kinds in ({"layers_block_type": blocks}, {"hybrid_override_pattern": "ME*-E"}):
        spec = model_spec_from_config({**config, **kinds}, source="config.json", name="m")
        assert (spec.num_layers, spec.moe_layers) == (5, (1, 4))
        assert spec.num_params_per_expert == 2 * 48 * 24
    latent = {**config, "layers_block_type": blocks, "moe_latent_size": 20}
    spec = model_spec_from_config(latent, source="config.json", name="m")
    assert spec.num_params_per_expert == 2 * 20 * 24


def test_a_number_that_is_given_for_each_layer():
    config = {**_TINY, "model_type": "hunyuan_v1_moe", "num_experts": 6}
    spec = model_spec_from_config({**config, "moe_topk": [2] * 5}, source="config.json", name="m")
    assert spec.top_k == 2
    with pytest.raises(ModelSpecError) as refused:
        model_spec_from_config({**config, "moe_topk": [2, 1]}, source="config.json", name="m")
    assert str(refused.value) == "config.json: moe_topk=[2, 1]: it must be the same for all layers"


# Refusals


@pytest.mark.parametrize("model_type", UNSUPPORTED)
def test_a_family_that_cannot_be_supported(model_type):
    with pytest.raises(ModelSpecError) as refused:
        model_spec_from_config({"model_type": model_type}, source="config.json", name="m")
    assert str(refused.value) == (
        f"config.json: model_type={model_type!r}: {UNSUPPORTED[model_type]}"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 0}, "c.json: hidden_size=0: a whole number of at least 1 is needed"),
        ({"hidden_size": -5}, "hidden_size=-5: a whole number of at least 1"),
        ({"hidden_size": "2048"}, "hidden_size='2048': a whole number"),
        ({"hidden_size": 2048.0}, "hidden_size=2048.0: a whole number"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True: a whole number"),
        ({"num_experts": [64]}, "num_experts=[64]: a whole number"),
        ({"num_experts": None}, "no field num_experts or num_local_experts or n_routed_experts"),
        ({"intermediate_size": None}, "no field intermediate_size or ffn_dim or n_inner"),
        (
            {"vocab_size": None},
            "no field vocab_size (model_type 'olmoe'): take the config.json that",
        ),
        ({"num_experts_per_tok": 65}, "num_experts_per_tok=65: more than num_experts=64"),
        ({"num_key_value_heads": 5}, "num_key_value_heads=5: must divide num_attention_heads=16"),
        ({"num_attention_heads": 4096}, "num_attention_heads=4096: more than hidden_size=2048"),
        ({"num_local_experts": 32}, "num_local_experts=32: the file also says num_experts=64"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no': true or false is needed"),
        ({"attention_bias": 1}, "attention_bias=1: true or false is needed"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype='float8_e4m3fn': one of bfloat16, float16"),
        ({"dtype": 16}, "dtype=16: a text is needed"),
        ({"architectures": "Olmoe"}, "architectures='Olmoe': a list of str values is needed"),
        ({"model_type": None}, "model_type=None: the name of a model family is needed"),
        (
            {"model_type": "qwen3_moe", "moe_intermediate_size": 8, "mlp_only_layers": ["0"]},
            "mlp_only_layers=['0']: a list of int values is needed",
        ),
        (
            {"model_type": "deepseek_v2", "moe_intermediate_size": 8, **_MLA},
            "no field q_lora_rank (model_type 'deepseek_v2')",
        ),
        (
            {
                "model_type": "glm4_moe_lite",
                **_MLA,
                "q_lora_rank": None,
                "mlp_layer_types": ["dense", "sparse"],
            },
            "mlp_layer_types=['dense', 'sparse']: must have one item for each of 16 layers",
        ),
    ],
)
def test_refuses_by_field_and_value(changes, message):
    with pytest.raises(ModelSpecError) as refused:
        model_spec_from_config({**_OLMOE, **changes}, source="c.json", name="m")
    assert message in str(refused.value)
    assert str(refused.value).startswith("c.json: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "config.json: not a JSON file (Expecting property name"),
        (b"\xff{}", "config.json: not a JSON file ('utf-8' codec"),
        (b"[1, 2]", "config.json: a JSON object is expected, not a list"),
        (b"[" * 100_000, "config.json: not a JSON file ("),
        (b"", "config.json: not a JSON file"),
    ],
)
def test_refuses_what_is_no_config(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelSpecError) as refused:
        read_model_spec(tmp_path)
    assert message in str(refused.value)


def test_refuses_a_path_without_a_config(tmp_path):
    for path, message in [
        (tmp_path, f"{tmp_path}/config.json: no such file. Name a model directory"),
        ("allenai/OLMoE-1B-7B-0924", "hf download ORG/MODEL config.json --local-dir DIR"),
        ("x" * 5000, "cannot be read (File name too long)"),
    ]:
        with pytest.raises(ModelSpecError) as refused:
            read_model_spec(path)
        assert message in str(refused.value)


_JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 99) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=4,
)
_MLA_CONFIG = {**_OLMOE, **_MLA, "q_lora_rank": 8, "moe_intermediate_size": 8}


@given(
    model_type=st.sampled_from([*FAMILIES, "unknown"]),
    changes=st.dictionaries(st.sampled_from([*_MLA_CONFIG, "mlp_layer_types"]), _JSON_VALUES),
)
def test_whatever_a_field_holds_it_is_read_or_refused(model_type, changes):
    config = {**_MLA_CONFIG, "model_type": model_type, **changes}
    try:
        spec = model_spec_from_config(config, source="config.json", name="m")
    except ModelSpecError:
        return
    assert spec.num_dense_params > 0
    assert (spec.num_expert_params > 0) == spec.is_moe
