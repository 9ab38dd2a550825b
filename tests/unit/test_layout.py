"""Which bytes go to which file: nothing is lost, nothing is there twice, all can be read."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ds_moe_ep.adapter.replace import SwappedLayer, shard_experts
from ds_moe_ep.checkpoint.files import CheckpointFiles
from ds_moe_ep.checkpoint.header import StoredTensor, make_header, read_header
from ds_moe_ep.checkpoint.layout import shard_tensors
from ds_moe_ep.checkpoint.mapping import ExpertTensor, check_experts, expert_tensors
from ds_moe_ep.errors import CheckpointError
from tests.helpers.families import FAMILIES, NUM_EXPERTS

_DTYPES = {"F32": 4, "BF16": 2, "U8": 1, "F64": 8}
_KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda key: key != "__metadata__"
)


@st.composite
def _sources(draw):
    """The tensors of two files, and which of them hold experts of a layer."""
    num_experts = draw(st.sampled_from([4, 6, 12]))
    layer = SwappedLayer("layer", "Experts", num_experts, range(num_experts))
    tensors, of_experts = {}, {}
    ends = {Path("a"): 8, Path("b"): 8}

    def add(key, shape):
        path, dtype = draw(st.sampled_from([*ends])), draw(st.sampled_from([*_DTYPES]))
        num_bytes = math.prod(shape) * _DTYPES[dtype]
        tensors[key] = (StoredTensor(path, ends[path], num_bytes, dtype, shape),)
        ends[path] += num_bytes

    shapes = st.lists(st.integers(0, 5), max_size=2).map(tuple)
    for i in range(draw(st.integers(0, 5))):
        add(f"dense.{i}", draw(shapes))
    for expert in range(num_experts):
        add(f"experts.{expert}.w", draw(shapes))
        of_experts[f"experts.{expert}.w"] = ExpertTensor(layer, expert)
    for i in range(draw(st.integers(0, 2))):
        add(f"fused.{i}", (num_experts, *draw(shapes)))
        of_experts[f"fused.{i}"] = ExpertTensor(layer, None)
    return tensors, of_experts, num_experts


@given(source=_sources(), data=st.data())
def test_every_byte_goes_to_one_file(source, data):
    tensors, of_experts, num_experts = source
    ep_size = data.draw(st.sampled_from([n for n in range(1, 13) if num_experts % n == 0]))
    files = shard_tensors(
        tensors, of_experts, ep_size, max_dense_bytes=data.draw(st.integers(0, 99))
    )
    for key, (whole,) in tensors.items():
        pieces = [held[key][0] for held in files.values() if key in held]
        if key.startswith("fused"):
            assert len(pieces) == ep_size
            assert len({piece.num_bytes for piece in pieces}) == 1
        else:
            assert pieces == [whole]
        ends = [whole.start, *(piece.start + piece.num_bytes for piece in pieces)]
        assert ends[:-1] == [piece.start for piece in pieces]  # in order, without a gap
        assert ends[-1] == whole.start + whole.num_bytes


@given(source=_sources(), data=st.data())
def test_an_expert_lies_in_the_file_of_the_rank_that_owns_it(source, data):
    tensors, of_experts, num_experts = source
    ep_size = data.draw(st.sampled_from([n for n in range(1, 13) if num_experts % n == 0]))
    files = shard_tensors(tensors, of_experts, ep_size, max_dense_bytes=10)
    for expert in range(num_experts):
        owner = expert * ep_size // num_experts
        assert (
            f"experts.{expert}.w" in files[f"experts-{owner + 1:05d}-of-{ep_size:05d}.safetensors"]
        )


@given(source=_sources(), max_bytes=st.integers(1, 99))
def test_dense_files_are_split_and_every_tensor_is_aligned(source, max_bytes):
    tensors, of_experts, _ = source
    files = shard_tensors(tensors, of_experts, 2, max_dense_bytes=max_bytes)
    dense = [name for name in files if name.startswith("dense")]
    assert dense == (
        ["dense.safetensors"]
        if len(dense) == 1
        else [f"dense-{i:05d}-of-{len(dense):05d}.safetensors" for i in range(1, len(dense) + 1)]
    )
    for name, held in files.items():
        offset = 0
        for (piece,) in held.values():
            assert offset % _DTYPES[piece.dtype] == 0
            offset += piece.num_bytes
        assert offset <= max_bytes or name not in dense or _has_one_with_bytes(held)


def _has_one_with_bytes(held):
    return sum(piece.num_bytes > 0 for (piece,) in held.values()) == 1


@given(
    tensors=st.dictionaries(_KEYS, st.lists(st.integers(0, 3), max_size=3).map(tuple), max_size=5),
    metadata=st.dictionaries(_KEYS, st.text(st.characters(exclude_categories=["Cs"])), max_size=2),
)
def test_safetensors_reads_the_header(tmp_path_factory, tensors, metadata):
    path = tmp_path_factory.mktemp("header") / "x.safetensors"
    planned = {
        key: (StoredTensor(Path("a"), 0, math.prod(shape) * 4, "F32", shape),)
        for key, shape in tensors.items()
    }
    values = torch.arange(sum(map(math.prod, tensors.values())), dtype=torch.float32)
    path.write_bytes(make_header(metadata, planned.items()) + values.numpy().tobytes())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == (metadata or None)
        parts = [file.get_tensor(key) for key in tensors]
    assert [part.shape for part in parts] == [*tensors.values()]
    assert torch.cat([torch.empty(0), *(part.flatten() for part in parts)]).equal(values)
    assert [*read_header(path)[1]] == [*tensors]


def test_a_header_is_what_safetensors_writes(tmp_path):
    tensors = {"b": torch.ones(2, 3), "a": torch.ones(1, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    metadata, stored = read_header(tmp_path / "x.safetensors")
    header = make_header(metadata, ((key, (tensor,)) for key, tensor in stored.items()))
    assert (tmp_path / "x.safetensors").read_bytes().startswith(header)


def test_rows_of_a_stored_tensor(tmp_path):
    values = torch.randn(6, 2, 3)
    save_file({"w": values}, tmp_path / "x.safetensors")
    part = read_header(tmp_path / "x.safetensors")[1]["w"].cut(range(2, 5))
    content = (tmp_path / "x.safetensors").read_bytes()[part.start : part.start + part.num_bytes]
    assert part.shape == (3, 2, 3)
    assert torch.equal(
        torch.frombuffer(bytearray(content), dtype=torch.float32), values[2:5].flatten()
    )
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], values)


@pytest.fixture(scope="module")
def olmoe():
    """A model on the meta device, its layers, and the parameters it has."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(FAMILIES["olmoe"]())
    return model, shard_experts(model, 4, 0)


def _classify(olmoe, **shapes):
    model, layers = olmoe
    stored = {
        key: (StoredTensor(Path("a"), 0, math.prod(shape) * 4, "F32", shape),)
        for key, shape in shapes.items()
    }
    return expert_tensors(model, CheckpointFiles(Path("."), stored), layers)


@given(
    layer=st.integers(0, 2),
    expert=st.integers(0, NUM_EXPERTS - 1),
    projection=st.sampled_from(["gate_proj", "up_proj", "down_proj"]),
)
def test_a_name_says_the_layer_and_the_expert(olmoe, layer, expert, projection):
    key = f"model.layers.{layer}.mlp.experts.{expert}.{projection}.weight"
    found = _classify(olmoe, **{key: (24, 32)})[key]
    assert found.layer.name == f"model.layers.{layer}.mlp.experts"
    assert found.expert == expert


@given(expert=st.integers(NUM_EXPERTS, 10**9))
def test_an_expert_that_the_layer_does_not_have(olmoe, expert):
    key = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    with pytest.raises(CheckpointError, match="1 tensors are of experts that config.json does not"):
        _classify(olmoe, **{key: (24, 32)})


@given(name=st.text(st.characters(codec="ascii"), min_size=1))
def test_other_names_are_not_of_experts(olmoe, name):
    dense = ["lm_head.weight", "model.layers.1.mlp.gate.weight", "model.layers.1.mlp.experts", name]
    assert _classify(olmoe, **{key: (24, 32) for key in dense}) == {}


def test_a_fused_tensor_holds_all_experts_of_its_layer(olmoe):
    key = "model.layers.1.mlp.experts.down_proj"
    assert _classify(olmoe, **{key: (NUM_EXPERTS, 32, 24)})[key].expert is None
    with pytest.raises(CheckpointError, match=f"{key} holds 9 experts, config.json says 8"):
        _classify(olmoe, **{key: (9, 32, 24)})


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ([], "no tensor holds the experts of layer"),
        ([0, 1, 3], "expert 2 has 0 tensors where others have 1; so it is with 1 of 4 experts"),
        ([0, 0, 1, 2, 3, 3], "expert 1 has 1 tensors where others have 2; so it is with 2 of 4"),
    ],
)
def test_experts_that_are_not_those_of_the_config(experts, expected):
    layer = SwappedLayer("layer", "Experts", 4, range(4))
    found = {str(i): ExpertTensor(layer, expert) for i, expert in enumerate(experts)}
    with pytest.raises(CheckpointError, match=expected):
        check_experts(found, ["layer"])
    check_experts({str(i): ExpertTensor(layer, i) for i in range(4)}, ["layer"])
    check_experts({"fused": ExpertTensor(layer, None)}, ["layer"])
