"""Conversions in this process: round trips, refusals, and going on where one was stopped."""

import fcntl
import filecmp
import json
import os
import shutil
import tracemalloc
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from ds_moe_ep.checkpoint import convert, load_expert_parallel_model, streams, writer
from ds_moe_ep.checkpoint.convert import (
    to_deepspeed,
    to_expert_sharded,
    to_hugging_face,
    verify,
)
from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.layout import PlannedFile, copied_file
from ds_moe_ep.checkpoint.manifest import MANIFEST_JSON, read_manifest
from ds_moe_ep.checkpoint.reader import TensorReader
from ds_moe_ep.cli import main
from ds_moe_ep.errors import AdapterError, CheckpointError, DsMoeEpError, PlanError
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import FAMILIES, NUM_EXPERTS, save_tiny

_EP_SIZE = 4
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_UPCYCLE = ["--upcycle-experts", "2", "--top-k", "1"]
_EXPERTS = [f"experts-{n:05d}-of-00004.safetensors" for n in range(1, 5)]


@pytest.fixture
def source(tmp_path):
    """A small model with a tokenizer's file and things that do not belong to a model."""
    folder = tmp_path / "source"
    save_tiny("olmoe", folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("free")
    (folder / "modeling_olmoe.py").write_text("raise SystemExit")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / ".git").mkdir()
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "target"


def _names(folder):
    return sorted(path.name for path in folder.iterdir())


def _same_files(one, other):
    assert _names(one) == _names(other)
    _, differ, errors = filecmp.cmpfiles(one, other, _names(one), shallow=False)
    assert not differ + errors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_there_and_back_and_loaded(family, tmp_path):
    save_tiny(family, tmp_path / "source")
    to_expert_sharded(tmp_path / "source", tmp_path / "ep", 2)
    to_hugging_face(tmp_path / "ep", tmp_path / "hf")
    _same_files(tmp_path / "source", tmp_path / "hf")
    _load_the_same(tmp_path / "source", tmp_path / "ep", ep_size=4, ep_rank=1)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "granitemoe", "gpt_oss"])
def test_it_loads_at_every_size(family, tmp_path):
    save_tiny(family, tmp_path / "source")
    to_expert_sharded(tmp_path / "source", tmp_path / "ep", _EP_SIZE, max_dense_bytes=20_000)
    assert len(list((tmp_path / "ep").glob("dense-*"))) > 1
    verify(tmp_path / "ep")
    for ep_size, ep_rank in ((1, 0), (2, 1), (4, 2), (8, 5)):
        _load_the_same(tmp_path / "source", tmp_path / "ep", ep_size=ep_size, ep_rank=ep_rank)


def _load_the_same(*folders, ep_size, ep_rank):
    models = [
        load_expert_parallel_model(folder, ParallelPlan(ep_size), ep_rank=ep_rank)[0]
        for folder in folders
    ]
    wanted, loaded = (model.state_dict() for model in models)
    assert wanted.keys() == loaded.keys()
    assert all(torch.equal(wanted[name], loaded[name]) for name in wanted)
    wanted, loaded = (model.generation_config.to_dict() for model in models)
    assert wanted == loaded


def test_a_source_of_several_files_comes_back_with_its_index(source, target, tmp_path):
    sharded = tmp_path / "sharded"
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    model.save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("model-*.safetensors"))) > 2
    to_expert_sharded(sharded, target, _EP_SIZE)
    to_hugging_face(target, tmp_path / "hf")
    _same_files(sharded, tmp_path / "hf")


@pytest.mark.parametrize("is_stale", [False, True])
def test_an_index_of_a_single_file_comes_back_unless_it_is_stale(
    source, target, tmp_path, is_stale
):
    weight_map = dict.fromkeys(load_file(source / _WEIGHTS), _WEIGHTS)
    if is_stale:
        weight_map |= {"lm_head.weight": "model-00002-of-00002.safetensors"}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (source / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    done = to_expert_sharded(source, target, _EP_SIZE)
    left_out = ("modeling_olmoe.py", "pytorch_model.bin")
    assert done.not_copied == ((_INDEX, *left_out)[1 - is_stale :])
    to_hugging_face(target, tmp_path / "hf")
    for name in (*done.not_copied, ".git"):
        (source / name).rmdir() if name == ".git" else (source / name).unlink()
    _same_files(source, tmp_path / "hf")
    assert (tmp_path / "hf" / _INDEX).exists() is not is_stale


def test_what_an_expert_sharded_checkpoint_consists_of(source, target):
    done = to_expert_sharded(source, target, _EP_SIZE)
    beside = ["LICENSE", "config.json", "generation_config.json", "tokenizer.json"]
    assert _names(target) == sorted([*_EXPERTS, "dense.safetensors", MANIFEST_JSON, *beside])
    assert done.num_files == len(_names(target))
    assert done.not_copied == ("modeling_olmoe.py", "pytorch_model.bin")
    manifest = read_manifest(target)
    assert manifest.plan.ep_size == _EP_SIZE
    assert manifest.source.name == "source"
    assert sorted([*manifest.files, MANIFEST_JSON]) == _names(target)
    for name in _EXPERTS:
        with safe_open(target / name, framework="pt") as file:
            experts = {int(key.split(".")[5]) for key in file.keys()}  # noqa: SIM118
        first = _EXPERTS.index(name) * 2
        assert experts == {first, first + 1}
    key = "model.layers.1.mlp.experts.5.up_proj.weight"
    assert manifest.tensors[key].files == [_EXPERTS[2]]
    assert torch.equal(load_file(target / _EXPERTS[2])[key], load_file(source / _WEIGHTS)[key])


def test_a_rank_reads_its_own_expert_file_and_no_other(source, target, monkeypatch):
    to_expert_sharded(source, target, _EP_SIZE)
    read_from = set()
    read = TensorReader.read

    def note(self, pieces):
        read_from.update(piece.path.name for piece in pieces)
        return read(self, pieces)

    monkeypatch.setattr(TensorReader, "read", note)
    load_expert_parallel_model(target, ParallelPlan(_EP_SIZE), ep_rank=2)
    assert read_from == {"dense.safetensors", _EXPERTS[2]}


def test_the_default_is_a_file_for_each_expert_up_to_64(source, target):
    to_expert_sharded(source, target)
    assert read_manifest(target).plan.ep_size == NUM_EXPERTS


def test_the_same_source_gives_the_same_bytes(source, target, tmp_path):
    to_expert_sharded(source, target, 2)
    to_expert_sharded(source, tmp_path / "again", 2)
    _same_files(target, tmp_path / "again")


def test_memory_does_not_grow_with_the_model(tmp_path):
    large = tmp_path / "large.bin"
    large.touch()
    with large.open("r+b") as file:
        file.truncate(200_000_000)
    tracemalloc.start()
    writer.write_folder(tmp_path / "target", [copied_file(large)], [])
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 30_000_000


def test_a_model_larger_than_any_memory_is_compared_without_being_built(source, target):
    config = json.loads((source / "config.json").read_text())
    config |= {"intermediate_size": 10**10}  # 20 TB a layer
    (source / "config.json").write_text(json.dumps(config))
    message = _refused(to_expert_sharded, source, target, 2)
    assert (
        "the weights do not fit config.json: 6 of the wrong shape: model.layers.0.mlp." in message
    )
    assert "down_proj is [8, 32, 24], the model's is [8, 32, 10000000000]" in message


def test_progress_counts_every_byte_once(source, target):
    seen = []

    class Bar:
        def __init__(self, total_bytes):
            self.total_bytes, self.done = total_bytes, []
            seen.append(self)

        def __enter__(self):
            return self.done.append

        def __exit__(self, *exc_info):
            pass

    to_expert_sharded(source, target, _EP_SIZE, show_progress=Bar)
    verify(target, show_progress=Bar)
    total = sum(file.num_bytes for file in read_manifest(target).files.values())
    assert [(bar.total_bytes, sum(bar.done)) for bar in seen] == [(total, total)] * 2


def _refused(convert, *args, error=CheckpointError):
    with pytest.raises(error) as refused:
        convert(*args)
    return str(refused.value)


def _change_tensors(folder, change):
    tensors = load_file(folder / _WEIGHTS)
    change(tensors)
    save_file(tensors, folder / _WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("ep_size", "error", "expected"),
    [
        (3, AdapterError, "ep_size=3 does not divide num_experts=8"),
        (16, AdapterError, "Use ep_size in [1, 2, 4, 8]"),
        (0, PlanError, "ep_size=0: at least 1 is needed"),
    ],
)
def test_an_ep_size_that_does_not_fit(source, target, ep_size, error, expected):
    assert expected in _refused(to_expert_sharded, source, target, ep_size, error=error)
    assert _names(target.parent) == ["source"]


def test_a_dense_model(tmp_path, target):
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llama")
    _refused(to_expert_sharded, tmp_path / "llama", target, 2, error=AdapterError)
    assert not target.exists()


def test_a_quantized_model(source, target):
    config = json.loads((source / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    assert "quantized" in _refused(to_expert_sharded, source, target, 2, error=AdapterError)


def test_a_missing_expert(source, target):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    _change_tensors(source, lambda tensors: tensors.pop(key))
    assert "model.layers.1.mlp.experts: expert 3 has 2 tensors where others have 3" in _refused(
        to_expert_sharded, source, target, 2
    )


_ALL_FAULTS = (
    "the weights do not fit config.json: 1 missing: model.norm.weight | 1 of the wrong shape: "
    "model.layers.1.mlp.gate.weight is [8, 7], the model's is [8, 32] | 2 not the model's: extra; "
    "model.extra.weight."
)


@pytest.mark.parametrize("convert", [to_expert_sharded, to_deepspeed])
def test_dense_tensors_that_are_not_those_of_the_config(source, target, convert):
    def change(tensors):
        del tensors["model.norm.weight"]
        tensors["model.layers.1.mlp.gate.weight"] = torch.ones(NUM_EXPERTS, 7)
        tensors |= {"model.extra.weight": torch.ones(1), "extra": torch.ones(1)}

    _change_tensors(source, change)
    assert _refused(convert, source, target) == f"{source}: {_ALL_FAULTS}"
    assert _names(target.parent) == ["source"]


def test_an_expert_of_the_wrong_shape(source, target):
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    _change_tensors(source, lambda tensors: tensors.update({key: torch.ones(24, 31)}))
    message = _refused(to_expert_sharded, source, target, 2)
    assert "1 not convertible: model.layers.1.mlp.experts.gate_up_proj" in message


def test_tensors_that_transformers_ignores_come_along(tmp_path, target):
    # DeepSeek-V3's checkpoint holds a 62nd layer that predicts a second token.
    save_tiny("deepseek_v3", tmp_path / "source")
    key = "model.layers.61.eh_proj.weight"
    _change_tensors(tmp_path / "source", lambda tensors: tensors.update({key: torch.ones(2)}))
    to_expert_sharded(tmp_path / "source", target, 2)
    assert key in read_manifest(target).tensors


@pytest.mark.parametrize("convert", [to_hugging_face, to_expert_sharded, to_deepspeed])
def test_a_folder_that_is_taken(source, target, convert):
    target.mkdir()
    (target / "thesis.txt").write_text("years")
    from_ = source
    if convert is to_hugging_face:
        from_ = target.with_name("ep")
        to_expert_sharded(source, from_, 2)
    assert f"{target} exists and is not empty" in _refused(convert, from_, target)
    assert _names(target) == ["thesis.txt"]


def test_an_empty_folder_is_filled(source, target):
    target.mkdir()
    to_expert_sharded(source, target, 2)
    verify(target)


def test_a_checkpoint_that_is_sharded_already(source, target, tmp_path):
    to_expert_sharded(source, target, 2)
    message = _refused(to_expert_sharded, target, tmp_path / "again")
    assert f"first go back: ds-moe-ep convert {target} DST --to hf" in message


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            None,
            "{0}: no such folder. Name an expert-sharded checkpoint, or write one: ds-moe-ep "
            "convert SRC {0} --to ep.",
        ),
        (
            [],
            "{0} has no manifest.json, so it is no whole expert-sharded checkpoint. Write one: "
            "ds-moe-ep convert SRC {0} --to ep.",
        ),
        (
            ["config.json", "global_step0"],
            "{0} has no manifest.json, so it is no whole expert-sharded checkpoint. Write one: "
            "ds-moe-ep convert SRC DST --to ep.",
        ),
    ],
)
@pytest.mark.parametrize("convert", [verify, lambda folder: to_hugging_face(folder, folder / "to")])
def test_only_an_expert_sharded_checkpoint_is_checked_or_goes_back(
    tmp_path, files, message, convert
):
    folder = tmp_path / "folder"
    if files is not None:
        folder.mkdir()
        for name in files:
            (folder / name).touch()
    assert _refused(convert, folder) == message.format(folder)


@pytest.mark.parametrize("name", [_WEIGHTS, _INDEX])
def test_a_hugging_face_directory_is_not_checked_and_needs_no_way_back(tmp_path, target, name):
    (tmp_path / name).touch()
    assert _refused(verify, tmp_path) == (
        f"{tmp_path} has no manifest.json: it is a Hugging Face directory, which does not say what "
        f"its bytes must be. For an expert-sharded checkpoint of it: ds-moe-ep convert {tmp_path} "
        "DST --to ep."
    )
    assert _refused(to_hugging_face, tmp_path, target) == (
        f"{tmp_path} is a Hugging Face directory with safetensors already: there is nothing to "
        "convert. Name an expert-sharded checkpoint, or one of Megatron's."
    )


@pytest.mark.parametrize("name", ["global_step0/mp_rank_00_model_states.pt", ".metadata"])
@pytest.mark.parametrize("to", [["ep"], ["deepspeed"], ["megatron"], ["ep", *_UPCYCLE]])
def test_another_format_without_a_config_is_told_for_what_it_is(tmp_path, capsys, name, to):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert main(["convert", str(tmp_path), str(tmp_path / "target"), "--to", *to]) == 2
    whose = "Megatron" if name == ".metadata" else "DeepSpeed"
    assert f"It is a checkpoint of {whose}" in capsys.readouterr().err


@pytest.mark.parametrize("to", [["ep"], ["deepspeed"], ["megatron"], ["ep", *_UPCYCLE]])
def test_a_name_on_the_hub_is_to_be_fetched_first(tmp_path, capsys, to):
    assert main(["convert", "allenai/OLMoE", str(tmp_path / "target"), "--to", *to]) == 2
    assert capsys.readouterr().err.endswith("hf download ORG/MODEL --local-dir DIR\n")


def test_what_could_not_be_done_is_told(source, target, monkeypatch, capsys):
    def fail(*args, **settings):
        raise PermissionError(13, "Permission denied", "elsewhere")

    monkeypatch.setattr(convert, "to_expert_sharded", fail)
    monkeypatch.setattr(convert, "verify", fail)
    assert main(["convert", str(source), str(target), "--to", "ep"]) == 2
    assert main(["convert", str(source), "--verify"]) == 2
    why = "([Errno 13] Permission denied: 'elsewhere')"
    assert capsys.readouterr().err.splitlines() == [
        f"CheckpointError: {source}: cannot be converted {why}.",
        f"CheckpointError: {source}: cannot be checked {why}.",
    ]


def test_names_that_are_no_text(source, target, tmp_path, capsys):
    source = source.rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    (source / os.fsdecode(b"th\xe9.bin")).touch()
    done = to_expert_sharded(source, target)
    assert done.not_copied == ("modeling_olmoe.py", "pytorch_model.bin", os.fsdecode(b"th\xe9.bin"))
    assert read_manifest(target).source.name == "caf\\xe9"
    verify(target)
    again = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")
    assert main(["convert", str(source), again, "--to", "ep"]) == 0
    assert main(["convert", again, "--verify"]) == 0
    wrote, not_copied, whole = capsys.readouterr().out.splitlines()
    assert wrote.startswith(f"wrote {tmp_path}/\\udce9: 14 files, ")
    assert not_copied == "not copied: modeling_olmoe.py, pytorch_model.bin, th\\udce9.bin"
    assert whole.startswith(f"{tmp_path}/\\udce9 is whole: 14 files, ")


@pytest.mark.parametrize("to", [["ep"], ["hf"], ["deepspeed"], ["megatron"], ["ep", *_UPCYCLE]])
def test_names_that_are_too_long(source, tmp_path, capsys, to):
    long = str(tmp_path / ("x" * 300))
    assert main(["convert", long, str(tmp_path / "target"), "--to", *to]) == 2
    message = capsys.readouterr().err
    assert f"Error: {long}" in message
    assert "File name too long" in message
    assert len(message.splitlines()) == 1
    assert sorted(os.listdir(tmp_path)) == ["source"]


def test_names_that_are_too_long_are_not_checked_or_written(source, tmp_path, capsys):
    long = str(tmp_path / ("x" * 300))
    assert main(["convert", long, "--verify"]) == 2
    assert main(["convert", str(source), long, "--to", "ep"]) == 2
    read, written = capsys.readouterr().err.splitlines()
    assert read.startswith(f"CheckpointError: {long}: cannot be read ([Errno 36] File name too lon")
    assert written.startswith(f"CheckpointError: {long} could not be written: [Errno 36] File name")
    with pytest.raises(CheckpointError, match="cannot be read .*File name too long"):
        open_checkpoint(Path(long))


def test_a_disk_that_is_too_small(source, target, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    message = _refused(to_expert_sharded, source, target, 2)
    needed = int(message.split(" needs ")[1].split(" bytes")[0].replace(",", ""))
    assert needed > (source / _WEIGHTS).stat().st_size
    assert f"but its disk has 1,000 free: {needed - 1000:,} too few" in message
    assert _names(target.parent) == ["source"]


@pytest.mark.parametrize("name", [*_EXPERTS, "dense.safetensors", "tokenizer.json"])
def test_one_wrong_bit_is_found_and_its_file_named(source, target, name):
    to_expert_sharded(source, target, _EP_SIZE)
    content = bytearray((target / name).read_bytes())
    content[-1] ^= 1
    (target / name).write_bytes(content)
    assert f"1 of 9 files are corrupt (their sha256 is not that in manifest.json): {name}." in (
        _refused(verify, target)
    )


class _Killed(BaseException):
    """Nobody catches it, as nobody catches a kill."""


@pytest.fixture
def killed(source, target, monkeypatch):
    """A conversion that was killed when it was to write its second expert file."""
    write = writer._Staging._write

    def write_one_by_one(self, file, progress):
        if file.name == _EXPERTS[1]:
            (self._folder / f"{file.name}.part").write_bytes(b"half")
            raise _Killed
        return write(self, file, progress)

    with monkeypatch.context() as patch:
        patch.setattr(streams, "_MAX_THREADS", 1)
        patch.setattr(writer._Staging, "_write", write_one_by_one)
        with pytest.raises(_Killed):
            to_expert_sharded(source, target, _EP_SIZE)
    return target.with_name("target.partial")


def test_what_is_half_written_is_not_taken_for_a_whole_one(source, target, killed):
    assert not target.exists()
    assert "config.json" not in _names(killed)
    assert MANIFEST_JSON not in _names(killed)
    assert "has no manifest.json" in _refused(verify, killed)
    with pytest.raises(DsMoeEpError):
        load_expert_parallel_model(killed, ParallelPlan(1), ep_rank=0)


def test_a_killed_conversion_goes_on(source, target, killed, tmp_path):
    finished = {path: path.stat().st_ino for path in killed.glob("*.safetensors")}
    assert sorted(path.name for path in finished) == ["dense.safetensors", _EXPERTS[0]]
    to_expert_sharded(source, target, _EP_SIZE)
    for path, inode in finished.items():
        assert (target / path.name).stat().st_ino == inode
    to_expert_sharded(source, tmp_path / "at-once", _EP_SIZE)
    _same_files(target, tmp_path / "at-once")
    assert not killed.exists()


def test_it_goes_on_however_the_folders_are_spelt(source, target, killed, monkeypatch):
    kept = (killed / _EXPERTS[0]).stat().st_ino
    monkeypatch.chdir(source)
    to_expert_sharded(Path("."), Path("../target"), _EP_SIZE)
    assert (target / _EXPERTS[0]).stat().st_ino == kept
    assert read_manifest(target).source.name == "source"


@pytest.mark.parametrize("damage", ["corrupt", "remove"])
def test_a_finished_file_that_was_damaged_is_written_again(source, target, killed, damage):
    path = killed / _EXPERTS[0]
    path.write_bytes(b"x" * path.stat().st_size) if damage == "corrupt" else path.unlink()
    to_expert_sharded(source, target, _EP_SIZE)
    verify(target)


def test_a_journal_that_was_cut_short_is_read_but_for_its_end(source, target, killed):
    journal = killed / "unfinished.jsonl"
    journal.write_text(journal.read_text()[:-9])
    kept = (killed / "dense.safetensors").stat().st_ino
    to_expert_sharded(source, target, _EP_SIZE)
    verify(target)
    assert (target / "dense.safetensors").stat().st_ino == kept


@pytest.mark.parametrize("change", ["plan", "source"])
def test_another_conversion_does_not_go_on_with_it(source, target, killed, change):
    if change == "source":
        _change_tensors(source, lambda tensors: tensors["lm_head.weight"].add_(1))
    message = _refused(to_expert_sharded, source, target, 2 if change == "plan" else _EP_SIZE)
    assert message.startswith(f"{killed} holds an unfinished conversion of other files or for ")
    assert message.endswith(f"Remove it, or name another folder than {target}.")


def test_a_folder_of_that_name_that_holds_something_else(source, target):
    partial = target.with_name("target.partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("years")
    assert f"{partial} holds something else" in _refused(to_expert_sharded, source, target, 2)
    assert _names(partial) == ["thesis.txt"]


def test_two_processes_do_not_write_the_same_folder(source, target, killed):
    with (killed / "unfinished.jsonl").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert f"{killed} is being written by another process" in _refused(
            to_expert_sharded, source, target, _EP_SIZE
        )


def test_a_source_that_shrinks_meanwhile(tmp_path, target):
    short = tmp_path / "short.bin"
    short.write_bytes(b"12345678")
    planned = copied_file(short)
    short.write_bytes(b"1234")
    message = _refused(writer.write_folder, target, [planned], [])
    assert message == f"{short} became shorter while it was read."


def test_a_file_that_a_function_makes(target):
    planned = PlannedFile("folder/made", b"", make=lambda out: [out.write(b"one"), out.write(b"2")])
    writer.write_folder(target, [planned], [])
    assert (target / "folder" / "made").read_bytes() == b"one2"
    assert _names(target) == ["folder"]


def test_a_disk_that_does_not_keep_what_was_written(target, monkeypatch):
    monkeypatch.setattr(writer, "hash_file", lambda path, progress, stop: "0" * 64)
    message = _refused(writer.write_folder, target, [PlannedFile("a", b"1")], [])
    assert "what was read again is not what was written" in message


def test_the_root_cannot_be_written():
    message = _refused(writer.write_folder, Path("/"), [PlannedFile("a", b"1")], [])
    assert message == (
        "/ is the root of all folders, which none can replace: nothing was written. Name a new "
        "folder, such as /model."
    )


def test_a_folder_that_cannot_be_made(source, tmp_path):
    (tmp_path / "file").touch()
    message = _refused(to_expert_sharded, source, tmp_path / "file" / "target", 2)
    assert "could not be written: " in message
