"""What each rank holds after loading, expert by expert and byte by byte, without any ranks."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.checkpoint.load import read_model_config
from ds_moe_ep.checkpoint.reader import TensorReader
from ds_moe_ep.errors import AdapterError, CheckpointError
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import CORE_FAMILIES, NUM_EXPERTS, save_tiny

_EP_SIZE = 4
_SAVED_NAME = "deepspeed_moe.experts."  # what the swap adds to the name of an expert parameter
_WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module", params=CORE_FAMILIES)
def family(request, tmp_path_factory):
    """A saved tiny model and plain transformers' reading of it."""
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny(request.param, folder)
    return folder, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture
def olmoe(tmp_path):
    save_tiny("olmoe", tmp_path)
    return tmp_path


def _load(folder, ep_rank=0, ep_size=_EP_SIZE, **kwargs):
    return load_expert_parallel_model(folder, ParallelPlan(ep_size), ep_rank=ep_rank, **kwargs)


def _refused(folder, ep_rank=0):
    with pytest.raises(CheckpointError) as refused:
        _load(folder, ep_rank)
    return str(refused.value)


def _change_tensors(folder, change):
    tensors = load_file(folder / _WEIGHTS)
    change(tensors)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("ep_rank", range(_EP_SIZE))
def test_a_rank_holds_its_slice_of_the_experts_and_all_dense_weights(family, ep_rank):
    folder, reference = family
    num_local = NUM_EXPERTS // _EP_SIZE
    own = slice(ep_rank * num_local, (ep_rank + 1) * num_local)
    model, _ = _load(folder, ep_rank)
    # A state dict has each expert by itself; these are the parameters that hold them all.
    dense = {name: v for name, v in model.state_dict().items() if _SAVED_NAME not in name}
    experts = {name: p for name, p in model.named_parameters() if _SAVED_NAME in name}
    loaded = {name.replace(_SAVED_NAME, ""): value for name, value in (dense | experts).items()}
    wanted = reference.state_dict()
    assert loaded.keys() == wanted.keys()
    of_experts = _expert_parameters(reference)
    for name, value in wanted.items():
        expected = value[own] if name in of_experts else value
        torch.testing.assert_close(loaded[name], expected, rtol=0, atol=0)
    buffers = dict(reference.named_buffers())
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, buffers[name], rtol=0, atol=0)


def test_only_own_experts_are_read(family, monkeypatch):
    folder, reference = family
    read_bytes = []
    read = TensorReader.read

    def count(self, pieces):
        tensor = read(self, pieces)
        read_bytes.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(TensorReader, "read", count)
    _load(folder)
    all_bytes = _stored_bytes(folder)
    expert_bytes = sum(param.nbytes for param in _expert_parameters(reference).values())
    assert sum(read_bytes) == all_bytes - expert_bytes + expert_bytes // _EP_SIZE


def _expert_parameters(reference):
    """The fused parameters of all experts of all layers, by name."""
    return {
        f"{name}.{param_name}": param
        for name, module in reference.named_modules()
        if hasattr(module, "_apply_gate")
        for param_name, param in module.named_parameters()
    }


def _stored_bytes(folder):
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118


def test_shards_give_the_same_model_as_one_file(olmoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    AutoModelForCausalLM.from_pretrained(olmoe).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    sharded, whole = _load(folder, 1)[0].state_dict(), _load(olmoe, 1)[0].state_dict()
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_tied_embeddings_are_one_tensor(tmp_path):
    save_tiny("qwen3_moe", tmp_path)
    model, _ = _load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bfloat16_spares_what_transformers_keeps_in_float32(tmp_path):
    save_tiny("deepseek_v3", tmp_path)
    model, _ = _load(tmp_path, dtype=torch.bfloat16)
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    kept = {
        name.split(".")[-1] for name, buffer in model.named_buffers() if buffer.dtype.itemsize == 4
    }
    assert kept == {"e_score_correction_bias", "inv_freq", "original_inv_freq"}


def test_the_models_own_generation_settings_are_read(olmoe):
    path = olmoe / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [2, 7]}))
    assert _load(olmoe)[0].generation_config.eos_token_id == [2, 7]


def test_the_model_is_ready_for_inference(olmoe):
    model, report = _load(olmoe, 2)
    assert not model.training
    assert report.ep_rank == 2
    assert report.layers[0].local_experts == range(4, 6)


def test_tensors_that_transformers_ignores_are_ignored(tmp_path):
    # DeepSeek-V3's checkpoint holds a 62nd layer that predicts a second token.
    save_tiny("deepseek_v3", tmp_path)
    _change_tensors(
        tmp_path, lambda tensors: tensors.update({"model.layers.61.eh_proj.weight": torch.ones(2)})
    )
    _load(tmp_path)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_a_missing_tensor(olmoe, name):
    _change_tensors(olmoe, lambda tensors: tensors.pop(name))
    assert _refused(olmoe) == (f"{olmoe}: the weights do not fit config.json: 1 missing: {name}.")


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_missing_expert_is_told_by_the_rank_that_owns_it(olmoe, projection):
    name = f"model.layers.1.mlp.experts.3.{projection}.weight"
    _change_tensors(olmoe, lambda tensors: tensors.pop(name))
    _load(olmoe, ep_rank=0)  # experts 0 and 1
    assert _refused(olmoe, ep_rank=1) == (f"the weights do not fit config.json: 1 missing: {name}.")


def test_an_expert_too_many(olmoe):
    name = "model.layers.1.mlp.experts.{}.up_proj.weight"
    _change_tensors(
        olmoe,
        lambda tensors: tensors.update({name.format(8): tensors[name.format(7)].clone()}),
    )
    assert f"1 tensors are of experts that config.json does not have ({name.format(8)})" in (
        _refused(olmoe)
    )


def test_an_expert_of_another_shape_than_the_others(olmoe):
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    _change_tensors(olmoe, lambda tensors: tensors.update({name: torch.ones(23, 32)}))
    assert _refused(olmoe, ep_rank=1) == (
        "model.layers.1.mlp.experts.*.up_proj.weight has another shape for some experts than for "
        "others: [23, 32] and [24, 32]. The weights are not those of one model."
    )


def test_experts_of_another_shape_than_the_config_says(olmoe):
    def widen(tensors):
        for expert in range(NUM_EXPERTS):
            tensors[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"] = torch.ones(32, 25)

    _change_tensors(olmoe, widen)
    name = "model.layers.1.mlp.experts.down_proj"
    assert f"1 of the wrong shape: {name} is [2, 32, 25], the model's is [2, 32, 24]" in (
        _refused(olmoe)
    )


def test_a_tensor_of_the_wrong_shape(olmoe):
    name = "model.layers.1.mlp.gate.weight"
    _change_tensors(olmoe, lambda tensors: tensors.update({name: torch.ones(NUM_EXPERTS, 7)}))
    assert f"1 of the wrong shape: {name} is [8, 7], the model's is [8, 32]" in _refused(olmoe)


def test_a_tensor_of_another_model(olmoe):
    _change_tensors(olmoe, lambda tensors: tensors.update({"model.extra.weight": torch.ones(1)}))
    assert "1 not the model's: model.extra.weight" in _refused(olmoe)


def test_a_fused_tensor_with_another_number_of_experts(tmp_path):
    save_tiny("gpt_oss", tmp_path)
    name = "model.layers.1.mlp.experts.down_proj_bias"
    _change_tensors(tmp_path, lambda tensors: tensors.update({name: torch.ones(16, 32)}))
    assert _refused(tmp_path) == (
        f"{name} holds 16 experts, config.json says 8. The weights are not those of this config."
    )


def test_quantized_weights(olmoe):
    path = olmoe / "config.json"
    config = json.loads(path.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    path.write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"quantized checkpoints \(fp8\) cannot be split"):
        _load(olmoe)


def test_a_model_without_experts(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="LlamaForCausalLM has no layer .* upcycle the model"):
        _load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda config: [],
        lambda config: config | {"hidden_size": "32"},
        lambda config: config | {"num_experts": None},
        lambda config: config | {"model_type": ["olmoe"]},
    ],
)
def test_a_config_that_breaks_transformers_class_is_refused(olmoe, change):
    path = olmoe / "config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(AdapterError, match=r"transformers cannot read config.json"):
        _load(olmoe)


def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterError, match=r"allenai/OLMoE has no config.json.*hf download"):
        read_model_config("allenai/OLMoE")
