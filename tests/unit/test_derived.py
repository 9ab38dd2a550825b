"""Tensors made while they are written: what torch would make of them, a little at a time."""

import math
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_moe_ep.checkpoint import derived
from ds_moe_ep.checkpoint.derived import DerivedTensor, DrawnValues, Noise, changed
from ds_moe_ep.checkpoint.header import ByteRange, StoredTensor
from ds_moe_ep.errors import CheckpointError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_OFFSET = 24  # of the tensor in its file


def _store(folder: Path, tensor: torch.Tensor, dtype: str) -> StoredTensor:
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    path = folder / "tensors"
    path.write_bytes(b"x" * _OFFSET + data + b"y")
    return StoredTensor(path, _OFFSET, len(data), dtype, tuple(tensor.shape))


def _bytes(part) -> bytes:
    """What the writer would write of a part of a file."""
    if isinstance(part, ByteRange):
        return part.path.read_bytes()[part.start : part.start + part.num_bytes]
    made = list(part.chunks())
    assert sum(map(len, made)) == part.num_bytes
    return b"".join(made)


def _values(part, dtype: torch.dtype) -> torch.Tensor:
    data = bytearray(_bytes(part))
    return torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)


@st.composite
def _cases(draw):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    rows = sorted(draw(st.lists(st.integers(0, height), min_size=2, max_size=2)))
    columns = sorted(draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    return (
        (height, width),
        draw(st.none() | st.just(range(*rows))),
        draw(st.none() | st.just(range(*columns))),
        draw(st.sampled_from([1.0, 4.0, 0.3])),
        draw(st.sampled_from([*_DTYPES])),
        draw(st.sampled_from([1, 16, 1 << 20])),
    )


@given(case=_cases())
@settings(max_examples=60, deadline=None)
def test_any_part_and_scale_is_what_torch_makes(tmp_path_factory, case):
    shape, rows, columns, scale, name, chunk_bytes = case
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(_DTYPES[name])
    stored = _store(tmp_path_factory.mktemp("stored"), tensor, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(derived, "_CHUNK_BYTES", chunk_bytes)
        part = changed(stored, rows=rows, columns=columns, scale=scale)
        actual = _values(part, tensor.dtype)
    wanted = tensor[rows.start : rows.stop] if rows is not None else tensor
    wanted = wanted[:, columns.start : columns.stop] if columns is not None else wanted
    assert torch.equal(actual, (wanted.double() * scale).to(tensor.dtype).flatten())
    is_as_wide = columns is None or len(columns) == shape[1]
    assert isinstance(part, ByteRange) == (is_as_wide and scale == 1.0)


def test_noise_depends_on_seed_and_stream_and_not_on_the_files(tmp_path):
    stored = _store(tmp_path, torch.full((30, 20), 2.0) + torch.randn(30, 20), "F32")
    made = [
        _bytes(changed(stored, noise=Noise(0.1, seed, stream)))
        for seed, stream in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    ]
    assert made[0] == made[1]
    assert len(set(made)) == 3
    (tmp_path / "elsewhere").mkdir()
    moved = _store(tmp_path / "elsewhere", _values(changed(stored), torch.float32), "F32")
    assert _bytes(changed(moved, noise=Noise(0.1, 0, "a"))) == made[0]


def test_noise_is_measured_by_the_whole_tensor(tmp_path):
    tensor = torch.cat([torch.zeros(50, 40), 10 * torch.randn(50, 40)])
    stored = _store(tmp_path, tensor, "F32")
    for scale in (1.0, 8.0):
        part = changed(stored, rows=range(50), scale=scale, noise=Noise(0.5, 0, ""))
        assert float(_values(part, torch.float32).std()) == pytest.approx(
            0.5 * scale * float(tensor.std()), rel=0.1
        )


def test_a_constant_has_no_noise(tmp_path):
    stored = _store(tmp_path, torch.full((7, 3), 0.1), "F32")
    assert _bytes(changed(stored, noise=Noise(0.5, 0, ""))) == _bytes(changed(stored))


def test_drawn_values_are_normal_and_of_their_seed():
    drawn = DrawnValues(torch.float32, 20_000, 0.02, seed=3, stream="router")
    values = _values(drawn, torch.float32)
    assert float(values.std()) == pytest.approx(0.02, rel=0.05)
    assert abs(float(values.mean())) < 0.001
    assert _bytes(drawn) == _bytes(DrawnValues(torch.float32, 20_000, 0.02, 3, "router"))
    assert _bytes(drawn) != _bytes(DrawnValues(torch.float32, 20_000, 0.02, 4, "router"))
    assert not any(_bytes(DrawnValues(torch.bfloat16, 7)))


def test_recipes_tell_what_is_made(tmp_path):
    stored = _store(tmp_path, torch.randn(4, 4), "F32")
    recipes = {
        changed(stored, columns=range(2), scale=scale, noise=noise).recipe()
        for scale in (1.0, 2.0)
        for noise in (None, Noise(0.1, 0, "a"), Noise(0.1, 1, "a"), Noise(0.2, 0, "a"))
    }
    assert len(recipes) == 8


def test_rows_of_a_derived_tensor_are_cut_by_part(tmp_path):
    tensor = torch.arange(12.0).view(6, 2)
    stored = _store(tmp_path, tensor, "F32")
    parts = tuple(changed(stored, rows=range(n, n + 1)) for n in range(6))
    fused = DerivedTensor("F32", (3, 2, 2), parts)  # two parts to a row
    cut = fused.cut(range(1, 3))
    assert (cut.shape, cut.num_bytes, cut.element_bytes) == ((2, 2, 2), 32, 4)
    values = torch.cat([_values(part, torch.float32) for part in cut.parts])
    assert torch.equal(values, tensor[2:].flatten())


def test_memory_does_not_grow_with_the_tensor(tmp_path):
    path, num_rows, width = tmp_path / "large", 50_000, 1000
    path.touch()
    with path.open("r+b") as file:
        file.truncate(num_rows * width * 2)
    stored = StoredTensor(path, 0, num_rows * width * 2, "BF16", (num_rows, width))
    part = changed(stored, scale=2.0, noise=Noise(0.1, 0, ""))
    tracemalloc.start()
    largest = max(len(chunk) for chunk in part.chunks())
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest <= 2 << 20
    assert peak_bytes < 40_000_000
    assert math.isclose(part.num_bytes, 100_000_000)


def test_a_file_that_became_shorter(tmp_path):
    stored = _store(tmp_path, torch.randn(8, 8), "F32")
    part = changed(stored, columns=range(4))
    with stored.path.open("r+b") as file:
        file.truncate(40)
    with pytest.raises(CheckpointError, match="became shorter while it was read"):
        _bytes(part)


def test_types_without_fractions_are_not_calculated_with(tmp_path):
    stored = StoredTensor(tmp_path / "x", 0, 4, "I8", (2, 2))
    assert isinstance(changed(stored, rows=range(1)), ByteRange)
    with pytest.raises(CheckpointError, match="a weight of type I8 cannot be upcycled"):
        changed(stored, scale=2.0)
