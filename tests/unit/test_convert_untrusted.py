"""Sources that need an explicit flag: pickled weights, and models with code of their own."""

import json
import os
import shutil
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, dynamic_module_utils

from ds_moe_ep.checkpoint import load_expert_parallel_model
from ds_moe_ep.checkpoint.convert import to_deepspeed, to_expert_sharded, to_hugging_face, verify
from ds_moe_ep.errors import AdapterError, CheckpointError
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import save_tiny

_CONVERSIONS = [to_expert_sharded, to_hugging_face, to_deepspeed]
_SAFETENSORS = "model.safetensors"
_BIN = "pytorch_model.bin"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _pickle(folder, num_files):
    """Puts pickled weights in place of safetensors, as transformers used to save them."""
    tensors = load_file(folder / _SAFETENSORS)
    (folder / _SAFETENSORS).unlink()
    names = [_BIN]
    if num_files > 1:
        names = [f"pytorch_model-{i + 1:05d}-of-{num_files:05d}.bin" for i in range(num_files)]
    parts = {name: {} for name in names}
    for number, (key, tensor) in enumerate(tensors.items()):
        parts[names[number % num_files]][key] = tensor
    for name, part in parts.items():
        torch.save(part, folder / name)
    if num_files > 1:
        weight_map = {key: name for name, part in parts.items() for key in part}
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / f"{_BIN}.index.json").write_text(json.dumps(index))


@pytest.fixture(params=[1, 3])
def pickled(request, tmp_path):
    """The same weights as safetensors and pickled."""
    save_tiny("olmoe", tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "pickled")
    _pickle(tmp_path / "pickled", request.param)
    return tmp_path / "source", tmp_path / "pickled", request.param


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def _tensors(folder):
    return {k: t for path in folder.glob("model*.safetensors") for k, t in load_file(path).items()}


def _same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_safetensors_are_made_of_pickled_weights(pickled, target):
    source, folder, num_files = pickled
    done = to_hugging_face(folder, target, allow_pickle=True)
    assert done.not_copied == ()
    assert _same(_tensors(target), _tensors(source))
    beside = ["config.json", "generation_config.json"]
    if num_files == 1:
        assert _names(target) == sorted([*beside, _SAFETENSORS])
    else:
        files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
        assert _names(target) == sorted([*beside, *files, f"{_SAFETENSORS}.index.json"])
        total = sum(tensor.nbytes for tensor in _tensors(source).values())
        index = json.loads((target / f"{_SAFETENSORS}.index.json").read_text())
        assert index["metadata"] == {"total_size": total}
    with safe_open(next(target.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    loaded = AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert _same(loaded, AutoModelForCausalLM.from_pretrained(source).state_dict())


def test_an_expert_sharded_checkpoint_of_pickled_weights(pickled, target, tmp_path):
    source, folder, _ = pickled
    to_expert_sharded(folder, target, 4, allow_pickle=True)
    verify(target)
    models = [
        load_expert_parallel_model(path, ParallelPlan(4), ep_rank=1)[0].state_dict()
        for path in (source, target)
    ]
    assert _same(*models)
    to_hugging_face(target, tmp_path / "back")
    assert _same(_tensors(tmp_path / "back"), _tensors(source))


def test_a_checkpoint_of_deepspeed_of_pickled_weights(pickled, target, tmp_path):
    source, folder, _ = pickled
    to_deepspeed(folder, target, allow_pickle=True)
    to_deepspeed(source, tmp_path / "wanted")
    for path in (tmp_path / "wanted" / "global_step0").iterdir():
        wanted, found = (
            torch.load(each, weights_only=True)
            for each in (path, target / "global_step0" / path.name)
        )
        assert _same(wanted.get("module", wanted), found.get("module", found))


@pytest.mark.parametrize("convert", _CONVERSIONS)
def test_pickled_weights_need_the_flag(pickled, target, convert):
    _, folder, _ = pickled
    with pytest.raises(CheckpointError, match=f"convert {folder} DST --to hf --allow-pickle"):
        convert(folder, target)
    assert not target.exists()


def test_pickled_weights_must_be_those_of_the_config(pickled, target):
    _, folder, _ = pickled
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 7}))
    with pytest.raises(CheckpointError, match="2 of the wrong shape: lm_head.weight is"):
        to_hugging_face(folder, target, allow_pickle=True)
    assert not target.exists()


def test_pickled_weights_of_a_dense_model(tmp_path, target):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    wanted = _tensors(tmp_path / "llama")
    _pickle(tmp_path / "llama", 1)
    to_hugging_face(tmp_path / "llama", target, allow_pickle=True)
    assert _same(_tensors(target), wanted)


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("convert", _CONVERSIONS)
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, target, convert):
    save_tiny("olmoe", tmp_path / "source")
    (tmp_path / "source" / _SAFETENSORS).unlink()
    torch.save({"w": _Malicious(tmp_path / "run")}, tmp_path / "source" / _BIN)
    with pytest.raises(CheckpointError, match=r"it asks for posix.mkdir, which can run code. None"):
        convert(tmp_path / "source", target, allow_pickle=True)
    assert _names(tmp_path) == ["source"]


_CODE = """
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


class MineConfig(Qwen3MoeConfig):
    model_type = "mine_moe"


class MineForCausalLM(Qwen3MoeForCausalLM):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(tmp_path, monkeypatch):
    """A model that only code in its own folder can build; importing it leaves a folder behind."""
    folder = tmp_path / "source"
    tensors = save_tiny("qwen3_moe", folder).state_dict()
    # transformers' names on disk are for families that it knows; another's are those in memory.
    del tensors["lm_head.weight"]  # tied
    save_file(tensors, folder / _SAFETENSORS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine_moe",
        "architectures": ["MineForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_mine.MineConfig",
            "AutoModelForCausalLM": "modeling_mine.MineForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    trace = f"import os\nos.makedirs({str(tmp_path / 'run')!r}, exist_ok=True)\n"
    (folder / "modeling_mine.py").write_text(trace + _CODE)
    # Where transformers copies code to before it imports it.
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.parametrize("convert", [to_expert_sharded, to_deepspeed])
def test_code_of_a_models_own_needs_the_flag(with_code, target, tmp_path, convert):
    with pytest.raises(AdapterError, match="asks for code of the model's own .* --trust-remote-c"):
        convert(with_code, target)
    assert _names(tmp_path) == ["source"]


def test_code_that_is_trusted_is_run_and_copied(with_code, target, tmp_path):
    done = to_expert_sharded(with_code, target, 2, trust_remote_code=True)
    assert (tmp_path / "run").exists()
    assert done.not_copied == ()
    to_hugging_face(target, tmp_path / "back")
    assert _names(tmp_path / "back") == _names(with_code)
    for path in with_code.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()


def test_code_is_not_fetched_from_a_hub(with_code, target):
    config = json.loads((with_code / "config.json").read_text())
    config["auto_map"]["AutoConfig"] = "someone/mine--modeling_mine.MineConfig"
    (with_code / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=r"another repository \(someone/mine--modeling_mine.Min"):
        to_expert_sharded(with_code, target, 2, trust_remote_code=True)


def test_code_that_fails_is_told(with_code, target):
    (with_code / "modeling_mine.py").write_text("raise LookupError('no such thing')")
    with pytest.raises(AdapterError) as refused:
        to_expert_sharded(with_code, target, 2, trust_remote_code=True)
    assert str(refused.value) == (
        f"{with_code}: the model's own code (auto_map) does not make a config: no such thing"
    )


def test_what_was_made_with_a_models_own_code_is_not_run_without_it(with_code, target):
    to_expert_sharded(with_code, target, 2, trust_remote_code=True)
    with pytest.raises(AdapterError, match="asks for code of the model's own"):
        load_expert_parallel_model(target, ParallelPlan(2), ep_rank=0)


def test_a_family_that_transformers_knows_is_built_without_the_folders_code(
    with_code, target, tmp_path
):
    config = json.loads((with_code / "config.json").read_text())
    (with_code / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_moe"}))
    done = to_expert_sharded(with_code, target, 2)
    assert done.not_copied == ("modeling_mine.py",)
    to_expert_sharded(with_code, tmp_path / "trusted", 2, trust_remote_code=True)
    assert not (tmp_path / "run").exists()
