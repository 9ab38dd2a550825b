import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from ds_moe_ep.checkpoint import weights_digest as module
from ds_moe_ep.checkpoint.convert import to_expert_sharded
from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.weights_digest import weights_digest
from ds_moe_ep.errors import CheckpointError
from tests.helpers.families import save_tiny


def digest(folder):
    return weights_digest(open_checkpoint(folder))


@pytest.fixture
def model(tmp_path):
    save_tiny("olmoe", tmp_path / "model")
    return tmp_path / "model"


def test_any_tensor_that_differs_makes_another_hash(model):
    path = model / "model.safetensors"
    tensors = load_file(path)
    known = {digest(model)}
    for key, tensor in tensors.items():
        save_file(tensors | {key: tensor + 0.01}, path, metadata={"format": "pt"})
        known.add(digest(model))
    assert len(known) == 1 + len(tensors)


def test_of_many_alike_some_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_MOST_ALIKE", 2)
    path = tmp_path / "model.safetensors"
    tensors = {f"experts.{number}.w": torch.zeros(8) for number in range(6)}
    tensors |= {"gate": torch.zeros(8), "norm": torch.zeros(8)}
    save_file(tensors, path)
    before, noticed = digest(tmp_path), []
    for key, tensor in tensors.items():
        save_file(tensors | {key: tensor + 1}, path)
        if digest(tmp_path) != before:
            noticed.append(key)
    assert noticed == ["experts.0.w", "experts.3.w", "gate", "norm"]
    save_file(tensors | {"experts.1.w": torch.zeros(9)}, path)
    assert digest(tmp_path) != before


@pytest.mark.parametrize("ep_size", [1, 2, 4])
def test_what_it_was_converted_to_has_the_same_hash(model, tmp_path, ep_size, monkeypatch):
    monkeypatch.setattr(module, "_STRETCH_BYTES", 1000)  # samples lie across the files' borders
    to_expert_sharded(model, tmp_path / "sharded", ep_size=ep_size, max_dense_bytes=3000)
    assert digest(tmp_path / "sharded") == digest(model)


def test_a_large_tensor_is_read_in_each_stretch(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_STRETCH_BYTES", 4000)
    values = torch.arange(5000, dtype=torch.uint8)  # two stretches of 2,500 bytes
    known = set()
    for place in (None, 1250, 3750, 0, 2499, 4999):
        changed = values.clone()
        if place is not None:
            changed[place] ^= 1
        save_file({"w": changed}, tmp_path / "model.safetensors")
        known.add(digest(tmp_path))
    assert len(known) == 3  # as it was, and two changes in the middle of a stretch


def test_tensors_smaller_than_a_sample_count_whole(tmp_path):
    known = set()
    for place in range(64):
        values = torch.zeros(64)
        values[place] = 1
        save_file({"w": values, "nothing": torch.zeros(0)}, tmp_path / "model.safetensors")
        known.add(digest(tmp_path))
    assert len(known) == 64


def test_a_file_that_became_shorter_is_told(model):
    files = open_checkpoint(model)
    path = model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match=f"{path} became shorter while it was read"):
        weights_digest(files)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"{model} cannot be read: .*No such file"):
        weights_digest(files)
