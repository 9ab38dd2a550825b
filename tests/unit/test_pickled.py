"""Pickled files: their tensors are found without running code; anything else is refused."""

import contextlib
import os
import shutil
import zipfile
from collections import OrderedDict
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.header import FileState
from ds_moe_ep.checkpoint.layout import PlannedFile
from ds_moe_ep.checkpoint.pickled import read_pickled, read_pickled_tensor
from ds_moe_ep.checkpoint.reader import DTYPES, TensorReader
from ds_moe_ep.checkpoint.writer import write_folder
from ds_moe_ep.errors import CheckpointError

_NAME = "pytorch_model.bin"


@pytest.fixture
def path(tmp_path):
    return tmp_path / _NAME


def _refused(path):
    with pytest.raises(CheckpointError) as refused:
        read_pickled(path)
    return str(refused.value)


def test_bytes_are_found_where_they_lie(path):
    matrix = torch.randn(6, 4)
    content = OrderedDict(
        matrix=matrix,
        rows=matrix[2:5],
        parameter=nn.Parameter(torch.randn(3, dtype=torch.bfloat16)),
        scalar=torch.tensor(3.0),
        empty=torch.empty(0, 5),
        **{name: torch.ones(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    )
    content._metadata = {"": {"version": 1}}  # as a state dict has it
    torch.save(content, path)
    stored = read_pickled(path)
    assert list(stored) == list(content)
    with TensorReader() as reader:
        for key, wanted in content.items():
            found = reader.read((stored[key],))
            assert found.dtype == wanted.dtype
            assert torch.equal(found, wanted)
    assert stored["rows"].start == stored["matrix"].start + 2 * 4 * 4


def test_a_file_that_changes_later_is_noticed(path):
    torch.save({"w": torch.ones(3)}, path)
    torch.save(torch.ones(3), path.parent / "alone")
    alone = path.parent / "alone"
    found = {
        path: read_pickled(path)["w"],
        alone: read_pickled_tensor(alone, 0, alone.stat().st_size),
    }
    for file, tensor in found.items():
        assert tensor.state == FileState.of(file)
        assert tensor.cut(range(1)).state == tensor.state
        os.utime(file, ns=(0, 0))
        with pytest.raises(CheckpointError, match=f"{file} has changed since the conversion beg"):
            write_folder(path.parent / "new", [PlannedFile("copy", b"", (tensor,))], [])
        shutil.rmtree(path.parent / "new.partial")


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8]),
    data=st.data(),
)
def test_rows_of_any_tensor_are_found(tmp_path_factory, shape, dtype, data):
    path = tmp_path_factory.mktemp("pickled") / _NAME
    whole = torch.randint(0, 99, shape).to(dtype)
    begin = data.draw(st.integers(0, shape[0]))
    content = {"rows": whole[begin : data.draw(st.integers(begin, shape[0]))], "whole": whole}
    torch.save(content, path)
    with TensorReader() as reader:
        for key, stored in read_pickled(path).items():
            assert torch.equal(reader.read((stored,)), content[key])


class _Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(path, tmp_path, legacy):
    content = {"w": torch.ones(1), "evil": _Malicious(tmp_path / "run")}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    message = _refused(path)
    assert not (tmp_path / "run").exists()
    if legacy:
        assert "in the format of torch before 1.6" in message
    else:
        assert f"{path} holds more than tensors: it asks for posix.mkdir, which can run code" in (
            message
        )
        assert "None was run" in message
        assert "weights_only" not in message  # torch's advice is to read it nevertheless


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(1)], "holds a list, no tensors by name"),
        ({"model": {"w": torch.ones(1)}}, "the entry 'model' is no tensor with a name"),
        ({1: torch.ones(1)}, "the entry 1 is no tensor with a name"),
        ({"w": torch.ones(2, 3).t()}, "w does not lie in the file as it is (strides (1, 3)"),
        ({"w": torch.ones(2, dtype=torch.complex64)}, "w does not lie in the file as it is"),
        ({"w": torch.eye(2).to_sparse()}, "w does not lie in the file as it is"),
    ],
)
def test_what_is_no_models_file(path, content, expected):
    torch.save(content, path)
    assert expected in _refused(path)


def test_a_truncated_file(path):
    torch.save({"w": torch.ones(100)}, path)
    path.write_bytes(path.read_bytes()[:-50])
    assert f"{path} ({path.stat().st_size:,} bytes) is truncated" in _refused(path)


def test_a_damaged_pickle(path):
    torch.save({"w": torch.ones(2)}, path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_vX"))
    assert "holds more than tensors: it asks for torch._utils._rebuild_tensor_vX" in _refused(path)


def test_a_tensor_without_bytes(path):
    torch.save({"w": torch.ones(2, device="meta")}, path)
    assert "is corrupt, or holds more than tensors" in _refused(path)


def test_a_pickle_that_ends_in_between(path):
    torch.save({"w": torch.ones(2)}, path)
    _rewrite(path, change=lambda name, data: data[:-9] if name.endswith(".pkl") else data)
    message = _refused(path)
    assert f"{path} is corrupt, or holds more than tensors (" in message
    assert "weights_only" not in message


@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1)
)
def test_whatever_the_bytes_it_is_refused_or_stays_in_the_file(tmp_path_factory, changes):
    path = tmp_path_factory.mktemp("pickled") / _NAME
    torch.save({"w": torch.ones(4, 5), "v": torch.ones(3)[1:]}, path)
    content = bytearray(path.read_bytes())
    for place, value in changes:
        content[int(place * len(content))] = value
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        for stored in read_pickled(path).values():
            assert 0 <= stored.start
            assert stored.start + stored.num_bytes <= len(content)


def _rewrite(path, *, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, change(name, data))


def test_a_compressed_file(path):
    torch.save({"w": torch.ones(100)}, path)
    _rewrite(path, compression=zipfile.ZIP_DEFLATED)
    with mock.patch.object(zipfile.ZipFile, "read") as read:
        assert "is compressed" in _refused(path)
    read.assert_not_called()  # it might be far larger than its file


def test_bytes_in_the_other_order(path):
    torch.save({"w": torch.ones(100)}, path)
    _rewrite(path, change=lambda name, data: b"big" if name.endswith("byteorder") else data)
    assert "big-endian" in _refused(path)


def test_it_is_read_when_asked_for_and_where_there_are_no_safetensors(path, tmp_path):
    torch.save({"w": torch.ones(2)}, path)
    with pytest.raises(CheckpointError, match=f"convert {tmp_path} DST --to hf --allow-pickle"):
        open_checkpoint(tmp_path)
    files = open_checkpoint(tmp_path, allow_pickle=True)
    assert files.is_pickled
    assert list(files.tensors) == ["w"]


def test_shards_are_found_by_their_index(tmp_path):
    for name in ("a", "b"):
        torch.save({name: torch.ones(2)}, tmp_path / f"pytorch_model-{name}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text('{"weight_map": {"a": "pytorch_model-a.bin", "b": "pytorch_model-b.bin"}}')
    files = open_checkpoint(tmp_path, allow_pickle=True)
    assert [pieces[0].path.name for pieces in files.tensors.values()] == [
        "pytorch_model-a.bin",
        "pytorch_model-b.bin",
    ]
    (tmp_path / "pytorch_model-b.bin").unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 files that {index.name} names are missing"):
        open_checkpoint(tmp_path, allow_pickle=True)
