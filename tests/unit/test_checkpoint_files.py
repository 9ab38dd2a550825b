"""Which file holds which tensor, and the refusal of every checkpoint that is not whole."""

import json

import pytest
import torch
from safetensors.torch import save_file

from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.hub_folder import describe_layout
from ds_moe_ep.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_SHARDS = {"shard-1.safetensors": ["a", "b"], "shard-2.safetensors": ["c"]}


@pytest.fixture
def sharded(tmp_path):
    """A checkpoint of two files with an index, as large models have it."""
    for name, keys in _SHARDS.items():
        save_file({key: torch.ones(3) for key in keys}, tmp_path / name)
    _write_index(tmp_path, {key: name for name, keys in _SHARDS.items() for key in keys})
    return tmp_path


def _write_index(folder, weight_map):
    (folder / _INDEX).write_text(json.dumps({"weight_map": weight_map}))


def _file_of(files):
    return {key: piece.path.name for key, (piece,) in files.tensors.items()}


def _refused(folder):
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    return str(refused.value)


def test_one_file(tmp_path):
    save_file({"a": torch.ones(3), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    files = open_checkpoint(tmp_path)
    assert files.folder == tmp_path
    assert _file_of(files) == {"a": "model.safetensors", "b": "model.safetensors"}


def test_an_index_and_its_files(sharded):
    expected = {"a": "shard-1.safetensors", "b": "shard-1.safetensors", "c": "shard-2.safetensors"}
    assert _file_of(open_checkpoint(sharded)) == expected


def test_one_file_beside_an_index_is_what_transformers_reads(sharded):
    save_file({"a": torch.ones(3), "d": torch.ones(1)}, sharded / "model.safetensors")
    files = open_checkpoint(sharded)
    assert _file_of(files) == {"a": "model.safetensors", "d": "model.safetensors"}
    described = describe_layout(files)
    assert (list(described.files), described.index) == (["model.safetensors"], None)


def test_no_weights(tmp_path):
    message = _refused(tmp_path)
    assert message.startswith(f"{tmp_path} has neither model.safetensors nor {_INDEX}.")
    assert "Name a Hugging Face model directory with its weights." in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json"])
def test_pickled_weights_are_not_read(tmp_path, name):
    (tmp_path / name).touch()
    message = _refused(tmp_path)
    assert "Pickled checkpoints (pytorch_model.bin) can run code and are not read." in message
    assert f"ds-moe-ep convert {tmp_path} DST --to hf --allow-pickle" in message


def test_a_checkpoint_of_deepspeed(tmp_path):
    (tmp_path / "global_step0").mkdir()
    (tmp_path / "global_step0" / "mp_rank_00_model_states.pt").touch()
    assert "It is a checkpoint of DeepSpeed, which DeepSpeed's own loader reads" in (
        _refused(tmp_path)
    )


def test_a_missing_file(sharded):
    (sharded / "shard-2.safetensors").unlink()
    assert _refused(sharded) == (
        f"{sharded}: 1 of 2 files that {_INDEX} names are missing: shard-2.safetensors."
    )


def test_many_missing_files_are_not_all_named(tmp_path):
    _write_index(tmp_path, {f"t{i}": f"shard-{i}.safetensors" for i in range(9)})
    message = _refused(tmp_path)
    assert "9 of 9 files" in message
    assert message.endswith("shard-4.safetensors and 4 more.")


@pytest.mark.parametrize("kept_bytes", [0, 4, 20, -1])
def test_a_truncated_file(sharded, kept_bytes):
    path = sharded / "shard-1.safetensors"
    content = path.read_bytes()[:kept_bytes]
    path.write_bytes(content)
    message = _refused(sharded)
    assert message.startswith(f"{path} ({len(content):,} bytes) is truncated or corrupt: ")
    assert message.endswith("Copy it again from its source.")


def test_a_file_that_is_something_else(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n" * 3)
    assert "is truncated or corrupt" in _refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '"weight_map"'],
)
def test_a_corrupt_index(tmp_path, content):
    (tmp_path / _INDEX).write_text(content)
    message = _refused(tmp_path)
    assert message.startswith(f"{tmp_path / _INDEX}: not an index of weights (")
    assert message.endswith("Copy it again from its source.")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    _write_index(tmp_path, {"a": name})
    assert _refused(tmp_path).endswith(f"names files outside of its folder: {name}.")


def test_a_tensor_that_only_the_index_knows(sharded):
    _write_index(sharded, {"a": "shard-1.safetensors", "lost": "shard-2.safetensors"})
    assert _refused(sharded) == (
        f"{sharded}: 1 tensors of {_INDEX} are in none of its 2 files: lost."
    )
