"""The layers that we give to Megatron compute what Hugging Face's do.

Weights are put in place by hand here, not by the conversion, whose parity is tested beside this.
"""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from ds_moe_ep.config.megatron import MegatronOptions, megatron_args
from ds_moe_ep.megatron.arguments import parse_arguments
from ds_moe_ep.megatron.model import build_model, start_model_parallel
from ds_moe_ep.model_spec import model_spec_from_config
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import VOCAB_SIZE, build_tiny

YARN = {
    "rope_theta": 10000.0,
    "rope_type": "yarn",
    "factor": 40,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
}
STRETCHED_V3 = YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}
V2_LITE = {"topk_method": "greedy", "q_lora_rank": None, "rope_parameters": YARN}
CASES = {
    "olmoe": ("olmoe", {}),
    "olmoe, a key for every query": ("olmoe", {"num_key_value_heads": 4}),
    "deepseek_v2, like V2-Lite": ("deepseek_v2", V2_LITE),
    "deepseek_v2, in groups": ("deepseek_v2", {"num_experts_per_tok": 2, "topk_group": 2}),
    "deepseek_v3": ("deepseek_v3", {"num_experts_per_tok": 4}),
    "deepseek_v3, stretched": (
        "deepseek_v3",
        {"num_experts_per_tok": 4, "rope_parameters": STRETCHED_V3},
    ),
}


@pytest.fixture
def build():
    """`build(config)` returns Megatron's model of a config, on one rank."""
    from megatron.core import parallel_state

    def built(config, left_out=""):
        spec = model_spec_from_config(config, source="config.json", name="tiny")
        text = megatron_args(ParallelPlan(ep_size=1), spec, config, MegatronOptions("local"))
        lines = [line for line in text.splitlines() if line.split()[0] not in ("#", left_out)]
        args = parse_arguments(" ".join(lines).split(), rank=0, world_size=1)
        start_model_parallel(args, timeout_s=60)
        return build_model(args, torch.device("cpu"))

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    yield built
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


NAMES = {
    "input_layernorm": "input_layernorm",
    "post_attention_layernorm": "pre_mlp_layernorm",
    "self_attn.o_proj": "self_attention.linear_proj",
    "self_attn.q_norm": "self_attention.q_layernorm",
    "self_attn.k_norm": "self_attention.k_layernorm",
    "self_attn.q_proj": "self_attention.linear_q_proj",
    "self_attn.q_a_proj": "self_attention.linear_q_down_proj",
    "self_attn.q_a_layernorm": "self_attention.q_layernorm",
    "self_attn.q_b_proj": "self_attention.linear_q_up_proj",
    "self_attn.kv_a_proj_with_mqa": "self_attention.linear_kv_down_proj",
    "self_attn.kv_a_layernorm": "self_attention.kv_layernorm",
    "self_attn.kv_b_proj": "self_attention.linear_kv_up_proj",
    "mlp.gate": "mlp.router",
    "mlp.down_proj": "mlp.linear_fc2",
    "mlp.shared_experts.down_proj": "mlp.shared_experts.linear_fc2",
}


def layer_weights(own, num_groups):
    """Return a layer's weights by Megatron's names."""
    if "self_attn.k_proj.weight" in own:
        # Of each group its queries, its key and its value, one after another.
        parts = [own.pop(f"self_attn.{name}_proj.weight") for name in "qkv"]
        parts = [part.unflatten(0, (num_groups, -1)) for part in parts]
        yield "self_attention.linear_qkv.weight", torch.cat(parts, dim=1).flatten(0, 1)
    for prefix in ("mlp", "mlp.shared_experts"):
        if f"{prefix}.gate_proj.weight" in own:
            parts = [own.pop(f"{prefix}.{name}_proj.weight") for name in ("gate", "up")]
            yield f"{prefix}.linear_fc1.weight", torch.cat(parts)
    for name, kind in (("gate_up_proj", "linear_fc1"), ("down_proj", "linear_fc2")):
        for expert, weight in enumerate(own.pop(f"mlp.experts.{name}", ())):
            yield f"mlp.experts.local_experts.{expert}.{kind}.weight", weight
    if "mlp.gate.e_score_correction_bias" in own:
        yield "mlp.router.expert_bias", own.pop("mlp.gate.e_score_correction_bias")
    for name, weight in own.items():
        yield f"{NAMES[name.removesuffix('.weight')]}.weight", weight


def copy_weights(hf, megatron):
    source = dict(hf.state_dict())
    made = {
        "embedding.word_embeddings.weight": source.pop("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": source.pop("model.norm.weight"),
        "output_layer.weight": source.pop("lm_head.weight"),
    }
    for layer in range(hf.config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        names = [name for name in source if name.startswith(prefix)]
        own = {name.removeprefix(prefix): source.pop(name) for name in names}
        for name, weight in layer_weights(own, hf.config.num_key_value_heads):
            made[f"decoder.layers.{layer}.{name}"] = weight
    assert not source
    missing, unexpected = megatron.load_state_dict(made, strict=False)
    assert not unexpected
    assert all(name.endswith(("_extra_state", "local_tokens_per_expert")) for name in missing)


@pytest.mark.parametrize("case", CASES)
def test_logits_are_hugging_faces(case, build):
    family, changes = CASES[case]
    hf = build_tiny(family, **changes)
    megatron = build(hf.config.to_dict() | {"dtype": "float32"})
    copy_weights(hf, megatron)
    ids = torch.randint(VOCAB_SIZE, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf(ids).logits
        found = megatron(ids, torch.arange(ids.shape[1]).expand_as(ids), None)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 5e-6


def test_megatrons_own_layers_do_not_fit_olmoe(build):
    hf = build_tiny("olmoe")
    config = hf.config.to_dict() | {"dtype": "float32"}
    with pytest.raises(RuntimeError, match="size mismatch for .*q_layernorm.weight"):
        copy_weights(hf, build(config, left_out="--spec"))
