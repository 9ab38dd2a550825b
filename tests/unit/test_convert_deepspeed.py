"""What a checkpoint for DeepSpeed holds: the adapted model's state dict, for every family.

That DeepSpeed reads it is tested in tests/dist/test_deepspeed_checkpoint.py.
"""

import errno
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_moe_ep.checkpoint import deepspeed_layout, load_expert_parallel_model, streams
from ds_moe_ep.checkpoint.convert import to_deepspeed, to_expert_sharded, to_hugging_face
from ds_moe_ep.checkpoint.upcycle import upcycle_to_expert_sharded
from ds_moe_ep.checkpoint.upcycled_tensors import UpcycleRequest
from ds_moe_ep.errors import CheckpointError
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import FAMILIES, NUM_EXPERTS, save_tiny

_DENSE = "mp_rank_00_model_states.pt"


def _read(folder):
    """The content of each file of the converted checkpoint, by its name."""
    tag = folder / (folder / "latest").read_text()
    return {path.name: torch.load(path, weights_only=True) for path in tag.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_bit_by_bit(family, tmp_path):
    save_tiny(family, tmp_path / "source")
    to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    files = _read(tmp_path / "deepspeed")
    dense = files.pop(_DENSE)
    model, report = load_expert_parallel_model(tmp_path / "source", ParallelPlan(1), ep_rank=0)
    assert dense["num_experts"] == [layer.num_experts for layer in report.layers]
    assert files.keys() == {
        f"layer_{index}_expert_{expert}_{_DENSE}"
        for index in range(len(report.layers))
        for expert in range(NUM_EXPERTS)
    }
    for index, layer in enumerate(report.layers):
        for expert in range(NUM_EXPERTS):
            part = f"{layer.name}.deepspeed_moe.experts.deepspeed_experts.{expert}."
            names = files[f"layer_{index}_expert_{expert}_{_DENSE}"]
            assert all(name.startswith(part) for name in names)
    written = dense["module"] | {key: t for content in files.values() for key, t in content.items()}
    wanted = model.state_dict()
    assert written.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(written[name], wanted[name])]
    assert not different


# Experts in a tensor each, and in one for all of a layer, which lies in several files then.
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_an_expert_sharded_checkpoint_gives_the_same(family, tmp_path):
    save_tiny(family, tmp_path / "source")
    to_deepspeed(tmp_path / "source", tmp_path / "wanted")
    to_expert_sharded(tmp_path / "source", tmp_path / "ep", 4)
    done = to_deepspeed(tmp_path / "ep", tmp_path / "deepspeed")
    assert done.not_copied == ()
    wanted, found = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / "wanted", tmp_path / "deepspeed")
    )
    assert wanted == found


def test_an_upcycled_model(tmp_path):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    request = UpcycleRequest(num_experts=4, top_k=2)
    upcycle_to_expert_sharded(tmp_path / "dense", tmp_path / "ep", request)
    to_deepspeed(tmp_path / "ep", tmp_path / "deepspeed")
    wanted = load_expert_parallel_model(tmp_path / "ep", ParallelPlan(1), ep_rank=0)[0].state_dict()
    files = _read(tmp_path / "deepspeed")
    written = files.pop(_DENSE)["module"]
    assert len(files) == 2 * 4
    written |= {name: tensor for content in files.values() for name, tensor in content.items()}
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], wanted[name]) for name in wanted)


def test_every_tensor_keeps_its_type(tmp_path):
    model = AutoModelForCausalLM.from_config(FAMILIES["deepseek_v3"](), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "model.safetensors"
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors = load_file(path) | {bias: torch.randn(NUM_EXPERTS)}
    save_file(tensors, path, metadata={"format": "pt"})
    to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    files = _read(tmp_path / "deepspeed")
    module = files.pop(_DENSE)["module"]
    assert torch.equal(module[bias], tensors[bias])
    kinds = {name: tensor.dtype for name, tensor in module.items()}
    assert kinds.pop(bias) == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert {t.dtype for content in files.values() for t in content.values()} == {torch.bfloat16}


def test_a_file_has_no_more_than_its_tensors(tmp_path):
    save_tiny("gpt_oss", tmp_path / "source")  # all experts of a layer in one tensor
    done = to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    assert done.num_files == len([p for p in (tmp_path / "deepspeed").rglob("*") if p.is_file()])
    for path in (tmp_path / "deepspeed").glob("*/layer_*"):
        num_bytes = sum(tensor.nbytes for tensor in torch.load(path, weights_only=True).values())
        assert path.stat().st_size < num_bytes + 4096


def test_tied_embeddings_are_written_once(tmp_path):
    save_tiny("qwen3_moe", tmp_path / "source")
    to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    module = _read(tmp_path / "deepspeed")[_DENSE]["module"]
    head, embedding = module["lm_head.weight"], module["model.embed_tokens.weight"]
    assert head.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()


def test_a_killed_conversion_goes_on(tmp_path, monkeypatch):
    save_tiny("olmoe", tmp_path / "source")
    write, written = deepspeed_layout._write_expert, []

    def write_some(names, layer, expert, *args):
        if len(written) == 9:
            raise KeyboardInterrupt
        written.append((layer, expert))
        write(names, layer, expert, *args)

    monkeypatch.setattr(deepspeed_layout, "_write_expert", write_some)
    with pytest.raises(KeyboardInterrupt):
        to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    assert not (tmp_path / "deepspeed").exists()
    finished = list((tmp_path / "deepspeed.partial").glob("*/*.pt"))
    assert finished
    kept = {path.name: path.stat().st_ino for path in finished}
    monkeypatch.undo()
    to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    inodes = {p.name: p.stat().st_ino for p in (tmp_path / "deepspeed").glob("*/*.pt")}
    assert {name: inodes[name] for name in kept} == kept
    assert len(inodes) == 3 * NUM_EXPERTS + 1
    assert not list((tmp_path / "deepspeed").rglob("*.part"))


def test_a_disk_that_fills_up(tmp_path, monkeypatch):
    save_tiny("olmoe", tmp_path / "source")
    write = streams.HashingSink.write
    left_bytes = 100_000

    def write_until_full(self, chunk):
        nonlocal left_bytes
        left_bytes -= len(chunk)
        if left_bytes < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, chunk)

    monkeypatch.setattr(streams.HashingSink, "write", write_until_full)
    with pytest.raises(CheckpointError, match="could not be written: .*No space left on device"):
        to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    assert not (tmp_path / "deepspeed").exists()


def test_what_deepspeed_insists_on_must_be_in_the_source(tmp_path, monkeypatch):
    save_tiny("olmoe", tmp_path / "source")
    monkeypatch.setattr(deepspeed_layout, "_with_tied", lambda model, tensors: {})
    with pytest.raises(CheckpointError, match="tensors are not in the source; transformers would"):
        to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_it_does_not_go_back(tmp_path):
    save_tiny("olmoe", tmp_path / "source")
    to_deepspeed(tmp_path / "source", tmp_path / "deepspeed")
    with pytest.raises(CheckpointError, match="is a checkpoint of DeepSpeed, which has other nam"):
        to_hugging_face(tmp_path / "deepspeed", tmp_path / "hf")
