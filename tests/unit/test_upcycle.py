"""Upcycled models against the dense ones they come from: same logits, as asked, reproducible."""

import filecmp
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
)

from ds_moe_ep.adapter import moe_layers
from ds_moe_ep.checkpoint import load_expert_parallel_model, streams, writer
from ds_moe_ep.checkpoint.convert import to_hugging_face, verify
from ds_moe_ep.checkpoint.manifest import read_manifest
from ds_moe_ep.checkpoint.upcycle import upcycle_to_expert_sharded, upcycle_to_hugging_face
from ds_moe_ep.checkpoint.upcycled_tensors import UpcycleRequest
from ds_moe_ep.errors import AdapterError, CheckpointError
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.dense import (
    DENSE_FAMILIES,
    FFN_WIDTH,
    NUM_LAYERS,
    VOCAB_SIZE,
    build_dense,
    save_dense,
)

_NUM_EXPERTS = 8
# Longer than the sliding windows and than what the rotary frequencies were scaled from.
_PROMPT = torch.randint(3, VOCAB_SIZE, (2, 19), generator=torch.Generator().manual_seed(0))
_EXACT = {
    "copy, top 1": UpcycleRequest(_NUM_EXPERTS, 1),
    "copy, top 2, router of zeros": UpcycleRequest(_NUM_EXPERTS, 2, router_std=0.0),
    "copy, top 8, every second layer": UpcycleRequest(_NUM_EXPERTS, 8, every=2, router_std=1.0),
    "split, all, router of zeros": UpcycleRequest(
        _NUM_EXPERTS, _NUM_EXPERTS, method="split", router_std=0.0
    ),
}
_HUGGING_FACE = {
    "llama": ("MixtralForCausalLM", {}),
    "llama, tied": ("MixtralForCausalLM", {"tie_word_embeddings": True}),
    "llama, what it ignores": ("MixtralForCausalLM", {"sliding_window": 4}),
    "mistral": ("MixtralForCausalLM", {}),
    "qwen2": ("Qwen2MoeForCausalLM", {}),
    "qwen2, sliding": (
        "Qwen2MoeForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3MoeForCausalLM", {}),
    "qwen3, sliding": (
        "Qwen3MoeForCausalLM",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
    ),
    "olmo2": ("FlexOlmoForCausalLM", {}),
}


def _logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(_PROMPT).logits


def _load(folder: Path) -> PreTrainedModel:
    """Loads an expert-sharded checkpoint with all experts on one rank, swapped."""
    model, _ = load_expert_parallel_model(folder, ParallelPlan(1), ep_rank=0)
    for layer in moe_layers(model):
        layer.deepspeed_moe._set_ep_group(None)
    return model


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_every_family_computes_what_the_dense_model_does(family, tmp_path):
    dense = save_dense(family, tmp_path / "dense")
    expected = _logits(dense)
    for number, (name, request) in enumerate(_EXACT.items()):
        folder = tmp_path / str(number)
        upcycle_to_expert_sharded(tmp_path / "dense", folder, request)
        model = _load(folder)
        layers = tuple(range(NUM_LAYERS)) if request.every is None else (1,)
        assert len(moe_layers(model)) == len(layers), name
        _close(_logits(model), expected)
        spec = read_model_spec(folder)
        assert (spec.num_experts, spec.top_k, spec.moe_layers) == (8, request.top_k, layers)
        assert spec.moe_intermediate_size == FFN_WIDTH // (8 if request.method == "split" else 1)
        assert spec.is_upcycled and spec.params_are_exact
        assert spec.num_params == sum(parameter.numel() for parameter in model.parameters())
    verify(folder)


@pytest.mark.parametrize("family", ["granite", "nemotron", "olmo", "stablelm", "starcoder2"])
def test_families_that_nobody_has_heard_of_here(family, tmp_path):
    dense = save_dense(family, tmp_path / "dense")
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", UpcycleRequest(4, 2))
    _close(_logits(_load(tmp_path / "ep")), _logits(dense))


def test_the_language_model_within_a_multimodal_one(tmp_path):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = Gemma3Config(
        text_config={**DENSE_FAMILIES["gemma3_text"], "num_hidden_layers": 4},
        vision_config={**sizes, "intermediate_size": 24, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        boi_token_index=5,
        eoi_token_index=6,
        image_token_index=0,
    )
    torch.manual_seed(0)
    dense = Gemma3ForConditionalGeneration(config).eval()
    dense.save_pretrained(tmp_path / "dense")
    request = UpcycleRequest(4, 2, every=2)
    with pytest.raises(AdapterError, match="Gemma3MLP, SiglipMLP. Name .* --ffn-class Gemma3MLP"):
        upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)
    request = replace(request, ffn_class="Gemma3MLP")
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)
    assert read_model_spec(tmp_path / "ep").moe_layers == (1, 3)
    _close(_logits(_load(tmp_path / "ep")), _logits(dense))


@pytest.mark.parametrize("case", _HUGGING_FACE)
def test_a_hugging_face_model_of_an_moe_family(case, tmp_path):
    architecture, settings = _HUGGING_FACE[case]
    dense = save_dense(case.split(",")[0], tmp_path / "dense", **settings)
    expected = _logits(dense)
    for number, request in enumerate(_EXACT.values()):
        if request.every is not None and not architecture.startswith("Qwen"):
            continue
        folder = tmp_path / str(number)
        upcycle_to_hugging_face(tmp_path / "dense", folder, request)
        model, seen = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(model).__name__ == architecture
        assert not any(seen.values())  # no tensor is missing, or not the model's
        assert model.dtype == dense.dtype
        _close(_logits(model), expected)
        spec = read_model_spec(folder)
        assert (spec.num_experts, spec.top_k) == (_NUM_EXPERTS, request.top_k)
        assert spec.moe_layers == ((1,) if request.every else tuple(range(NUM_LAYERS)))
    generation = model.generation_config
    assert generation.eos_token_id == dense.generation_config.eos_token_id


@pytest.mark.parametrize(
    ("family", "num_experts"), [("llama", "num_local_experts"), ("qwen3", "num_experts")]
)
def test_the_config_of_a_hugging_face_model(family, num_experts, tmp_path):
    build_dense(family).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    upcycle_to_hugging_face(tmp_path / "dense", tmp_path / "hf", UpcycleRequest(8, 2))
    dense = json.loads((tmp_path / "dense" / "config.json").read_text())
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    # The one spelling of it that other programs and older versions know.
    spelt = {key for key in config if key in ("num_experts", "num_local_experts")}
    assert (spelt, config[num_experts]) == ({num_experts}, 8)
    assert not [key for key in config if key.startswith("_")]  # no path of this machine
    assert config["dtype"] == "bfloat16"
    not_the_same = {"architectures", "model_type"}
    if family == "llama":  # Mixtral has no biases, so no switches for them
        not_the_same |= {"attention_bias", "mlp_bias"}
        assert not config.keys() & {"attention_bias", "mlp_bias"}
    assert not [key for key in dense.keys() - not_the_same if config.get(key) != dense[key]]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "hf").dtype == torch.bfloat16


def test_both_formats_hold_the_same_experts(tmp_path):
    save_dense("qwen3", tmp_path / "dense")
    request = UpcycleRequest(_NUM_EXPERTS, 2, layers=(0, 2), noise=0.2, router_std=0.5, seed=7)
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, 4)
    upcycle_to_hugging_face(tmp_path / "dense", tmp_path / "hf", request)
    _close(
        _logits(_load(tmp_path / "ep")),
        _logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")),
    )


def test_a_hugging_face_model_of_several_files(tmp_path):
    dense = save_dense("mistral", tmp_path / "dense")
    request = UpcycleRequest(_NUM_EXPERTS, 2)
    upcycle_to_hugging_face(tmp_path / "dense", tmp_path / "hf", request, max_file_bytes=20_000)
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 3
    _close(_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), _logits(dense))


@pytest.mark.parametrize("ep_size", [2, 4, 8])
def test_each_rank_gets_its_own_experts(ep_size, tmp_path):
    save_dense("gpt2", tmp_path / "dense")
    request = UpcycleRequest(_NUM_EXPERTS, 2, noise=0.5)
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, 4)
    whole = dict(_load(tmp_path / "ep").named_parameters())
    num_local = _NUM_EXPERTS // ep_size
    for ep_rank in (0, ep_size - 1):
        model, _ = load_expert_parallel_model(
            tmp_path / "ep", ParallelPlan(ep_size), ep_rank=ep_rank
        )
        for key, tensor in model.named_parameters():
            wanted = whole[key]
            if ".deepspeed_moe." in key:
                wanted = wanted[ep_rank * num_local : (ep_rank + 1) * num_local]
            assert torch.equal(tensor, wanted), key


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an expert-sharded checkpoint with one expert file."""
    return {
        key: tensor
        for path in folder.glob("*.safetensors")
        for key, tensor in load_file(path).items()
    }


def test_a_checkpoint_that_spells_its_names_as_the_hub_does(tmp_path):
    """GPT-2's has no prefix in its names, and masks that are no weights any more."""
    dense = save_dense("gpt2", tmp_path / "dense")
    path = tmp_path / "dense" / "model.safetensors"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
    save_file(tensors, path, metadata={"format": "pt"})
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", UpcycleRequest(4, 2, every=2))
    _close(_logits(_load(tmp_path / "ep")), _logits(dense))


def test_copies_are_bit_by_bit_the_ffn(tmp_path):
    dense = build_dense("phi3").to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", UpcycleRequest(4, 2), 1)
    made = _tensors(tmp_path / "ep")
    for key, tensor in dense.state_dict().items():
        if ".mlp." not in key:
            assert torch.equal(made.pop(key), tensor), key
            continue
        fused = made.pop(key.replace(".mlp.", ".mlp.experts.").removesuffix(".weight"))
        assert fused.shape == (4, *tensor.shape)
        assert all(torch.equal(expert, tensor) for expert in fused)
    assert made.keys() == {f"model.layers.{n}.mlp.router.weight" for n in range(NUM_LAYERS)}


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2", "phi"])
def test_split_spreads_the_neurons(family, tmp_path):
    dense = save_dense(family, tmp_path / "dense")
    upcycle_to_expert_sharded(
        tmp_path / "dense", tmp_path / "ep", UpcycleRequest(4, 4, method="split"), 1
    )
    made, old, width = _tensors(tmp_path / "ep"), dense.state_dict(), FFN_WIDTH // 4
    name = "transformer.h.1.mlp" if family == "gpt2" else "model.layers.1.mlp"
    for expert in range(4):
        own = slice(expert * width, (expert + 1) * width)
        if family == "llama":
            up = torch.cat([old[f"{name}.{part}_proj.weight"][own] for part in ("gate", "up")])
            down = old[f"{name}.down_proj.weight"][:, own]
        elif family == "phi3":
            gate, up = old[f"{name}.gate_up_proj.weight"].chunk(2)
            up, down = torch.cat([gate[own], up[own]]), old[f"{name}.down_proj.weight"][:, own]
        elif family == "gpt2":
            up, down = old[f"{name}.c_fc.weight"][:, own], old[f"{name}.c_proj.weight"][own]
        else:
            up, down = old[f"{name}.fc1.weight"][own], old[f"{name}.fc2.weight"][:, own]
            bias = made[f"{name}.experts.up_proj_bias"][expert]
            assert torch.equal(bias, old[f"{name}.fc1.bias"][own])
            bias = made[f"{name}.experts.down_proj_bias"][expert]
            assert torch.equal(bias, old[f"{name}.fc2.bias"])
        parameter = "gate_up_proj" if family in ("llama", "phi3") else "up_proj"
        assert torch.equal(made[f"{name}.experts.{parameter}"][expert], up)
        assert torch.equal(made[f"{name}.experts.down_proj"][expert], 4 * down)


def test_split_with_fewer_experts_a_token_keeps_the_scale(tmp_path):
    """A token's experts stand for all: their mean is what all of them together were."""
    dense = save_dense("llama", tmp_path / "dense", num_hidden_layers=1)
    ffn = dense.model.layers[0].mlp
    with torch.no_grad():  # all neurons alike, so any choice of them must give the whole
        for matrix in (ffn.gate_proj, ffn.up_proj):
            matrix.weight.copy_(matrix.weight[:1].expand_as(matrix.weight))
        ffn.down_proj.weight.copy_(ffn.down_proj.weight[:, :1].expand_as(ffn.down_proj.weight))
    dense.save_pretrained(tmp_path / "dense")
    request = UpcycleRequest(_NUM_EXPERTS, 3, method="split", router_std=1.0)
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)
    _close(_logits(_load(tmp_path / "ep")), _logits(dense))


def test_noise_is_relative_and_the_seed_decides(tmp_path):
    save_dense("llama", tmp_path / "dense", hidden_size=64, intermediate_size=256)
    made = {}
    for name, seed in (("a", 1), ("again", 1), ("other", 2)):
        request = UpcycleRequest(2, 1, layers=(1,), noise=0.1, seed=seed)
        upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / name, request, 2)
        made[name] = load_file(tmp_path / name / "experts-00002-of-00002.safetensors")
    weights = sorted(path.name for path in (tmp_path / "a").glob("*.safetensors"))
    _, *different = filecmp.cmpfiles(tmp_path / "a", tmp_path / "again", weights, shallow=False)
    assert different == [[], []]
    _, differ, _ = filecmp.cmpfiles(tmp_path / "a", tmp_path / "other", weights, shallow=False)
    assert sorted(differ) == weights  # the router is in the dense file
    dense = load_file(tmp_path / "dense" / "model.safetensors")
    first = load_file(tmp_path / "a" / "experts-00001-of-00002.safetensors")
    key = "model.layers.1.mlp.experts.down_proj"
    tensor = dense["model.layers.1.mlp.down_proj.weight"]
    noises = [first[key][0] - tensor, made["a"][key][0] - tensor]
    for noise in noises:
        assert float(noise.std()) == pytest.approx(0.1 * float(tensor.std()), rel=0.05)
        assert abs(noise.mean()) < 0.01 * tensor.std()
    assert not torch.allclose(*noises, atol=1e-3)
    gate = first["model.layers.1.mlp.experts.gate_up_proj"][0][:256]
    noise = gate - dense["model.layers.1.mlp.gate_proj.weight"]
    assert abs((noise * noises[0].T).mean()) < 0.1 * noise.std() * noises[0].std()


def test_the_router_is_drawn_or_zero(tmp_path):
    save_dense("opt", tmp_path / "dense")
    for name, std in (("drawn", 0.5), ("zero", 0.0)):
        request = UpcycleRequest(64, 2, router_std=std)
        upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / name, request)
        tensors = load_file(tmp_path / name / "dense.safetensors")
        routers = [tensor for key, tensor in tensors.items() if key.endswith("router.weight")]
        assert len(routers) == NUM_LAYERS
        assert float(torch.stack(routers).std()) == pytest.approx(std, rel=0.05)


def test_what_an_upcycled_checkpoint_consists_of(tmp_path):
    save_dense("gemma2", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer.json").write_text("{}")
    (tmp_path / "dense" / "notes.bin").write_text("mine")
    request = UpcycleRequest(_NUM_EXPERTS, 2, every=3)
    done = upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, 2)
    names = sorted(path.name for path in (tmp_path / "ep").iterdir())
    experts = [f"experts-0000{n}-of-00002.safetensors" for n in (1, 2)]
    beside = ["config.json", "generation_config.json", "manifest.json", "tokenizer.json"]
    assert names == sorted([*experts, *beside, "dense.safetensors"])
    assert (done.num_files, done.not_copied) == (len(names), ("notes.bin",))
    config = json.loads((tmp_path / "ep" / "config.json").read_text())
    assert config.pop("ds_moe_ep_upcycle") == {
        "num_experts": 8,
        "top_k": 2,
        "layers": [2],
        "method": "copy",
        "ffn_class": "Gemma2MLP",
    }
    assert config == json.loads((tmp_path / "dense" / "config.json").read_text())
    assert read_manifest(tmp_path / "ep").source.files == {}
    with pytest.raises(CheckpointError, match="was upcycled from a dense model, so there is no"):
        to_hugging_face(tmp_path / "ep", tmp_path / "back")


def test_pickled_weights_where_that_is_allowed(tmp_path):
    dense = save_dense("phi", tmp_path / "dense")
    (tmp_path / "dense" / "model.safetensors").unlink()
    torch.save(dense.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    request = UpcycleRequest(_NUM_EXPERTS, 2)
    with pytest.raises(CheckpointError, match="can run code"):
        upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, allow_pickle=True)
    _close(_logits(_load(tmp_path / "ep")), _logits(dense))


class _Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


def test_a_killed_conversion_goes_on_unless_something_else_is_asked_for(tmp_path, monkeypatch):
    save_dense("llama", tmp_path / "dense")
    request = UpcycleRequest(_NUM_EXPERTS, 2, noise=0.1)
    write = writer._Staging._write

    def write_one_by_one(self, file, progress):
        if file.name.startswith("experts-00003"):
            raise _Killed
        return write(self, file, progress)

    with monkeypatch.context() as patch:
        patch.setattr(streams, "_MAX_THREADS", 1)
        patch.setattr(writer._Staging, "_write", write_one_by_one)
        with pytest.raises(_Killed):
            upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, 4)
    other = UpcycleRequest(_NUM_EXPERTS, 2, noise=0.1, seed=1)
    with pytest.raises(CheckpointError, match="an unfinished conversion of other files"):
        upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", other, 4)
    finished = sorted((tmp_path / "ep.partial").glob("experts-*.safetensors"))
    inodes = {path.name: path.stat().st_ino for path in finished}
    assert len(inodes) == 2
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request, 4)
    assert all((tmp_path / "ep" / name).stat().st_ino == inode for name, inode in inodes.items())
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "at-once", request, 4)
    names = [path.name for path in (tmp_path / "ep").iterdir()]
    assert filecmp.cmpfiles(tmp_path / "ep", tmp_path / "at-once", names, shallow=False)[1:] == (
        [],
        [],
    )
