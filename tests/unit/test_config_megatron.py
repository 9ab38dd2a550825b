"""megatron.args: names that Megatron has, values by family, refusals where it would differ."""

import json
import re

import pytest

from ds_moe_ep.config.megatron import megatron_args
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import model_spec_from_config
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.launch import REPO

EP64 = ParallelPlan(ep_size=64)

# Options of megatron-core 0.19.2's own parser (and of 0.16.1's, but for the last line).
MEGATRON_OPTIONS = set(
    """--tensor-model-parallel-size --pipeline-model-parallel-size --expert-model-parallel-size
    --expert-tensor-parallel-size --sequence-parallel --num-layers --hidden-size --ffn-hidden-size
    --num-attention-heads --kv-channels --group-query-attention --num-query-groups
    --max-position-embeddings --seq-length --micro-batch-size --normalization --norm-epsilon
    --position-embedding-type --rotary-base --rope-type --rotary-scaling-factor --mscale
    --mscale-all-dim --swiglu --disable-bias-linear --add-qkv-bias
    --untie-embeddings-and-output-weights --attention-dropout --hidden-dropout --num-experts
    --moe-router-topk --moe-ffn-hidden-size --moe-layer-freq --moe-shared-expert-intermediate-size
    --moe-shared-expert-gate --moe-token-dispatcher-type --moe-router-load-balancing-type
    --moe-router-pre-softmax --moe-router-score-function --moe-router-enable-expert-bias
    --moe-router-topk-scaling-factor --moe-router-num-groups --moe-router-group-topk
    --multi-latent-attention --q-lora-rank --kv-lora-rank --qk-head-dim --qk-pos-emb-head-dim
    --v-head-dim --qk-layernorm --bf16 --fp16
    --padded-vocab-size""".split()
)

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


def text(config, plan=EP64):
    spec = model_spec_from_config(config, source="config.json", name="model")
    return megatron_args(plan, spec, config)


def arguments(config, plan=EP64):
    """Return the arguments as the command line in the file's comment gives them to Megatron."""
    words = " ".join(line for line in text(config, plan).splitlines() if line[0] != "#").split()
    pairs = {}
    for word in words:
        if word.startswith("--"):
            assert word not in pairs
            pairs[word] = True
            last = word
        else:
            assert pairs[last] is True
            pairs[last] = word
    return pairs


def refusal(config):
    with pytest.raises(ConfigError) as refused:
        text(config)
    return str(refused.value)


@pytest.mark.parametrize("config", FAMILIES, ids=lambda config: config["model_type"])
def test_every_name_is_one_that_megatron_has(config):
    assert arguments(config).keys() <= MEGATRON_OPTIONS


def test_olmoe_in_full():
    assert text(OLMOE).splitlines()[5:] == [
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
        "--bf16",
    ]


def test_olmoe_says_that_stock_attention_does_not_fit():
    assert "--spec names a layer whose attention does as OLMoE does" in text(OLMOE)
    assert "--spec" not in text(QWEN3_MOE)


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
    config = {name: value for name, value in OLMOE.items() if not name.startswith("rope")}
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
        (DEEPSEEK_V2_LITE, "q_lora_rank=null: Megatron's local layers cannot normalise"),
        (
            DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3},
            "topk_group=3 with num_experts_per_tok=6: Megatron would rank the groups by their bes",
        ),
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
    ],
)
def test_splits_that_megatron_cannot_make_are_refused(config, sizes, message):
    with pytest.raises(ConfigError, match=message):
        text(config, ParallelPlan(ep_size=32, **sizes))


def test_groups_that_megatron_ranks_alike_are_accepted():
    config = DEEPSEEK_V2 | {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 6}
    assert arguments(config)["--moe-router-group-topk"] == "6"
