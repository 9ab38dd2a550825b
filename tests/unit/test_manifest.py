"""What manifest.json may say, and that what it says is compared with the files."""

import json
from pathlib import PurePosixPath, PureWindowsPath

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.manifest import (
    INDEX_JSON,
    MANIFEST_JSON,
    FileEntry,
    Manifest,
    PlanSection,
    SourceFile,
    SourceSection,
    TensorEntry,
    is_file_name,
    read_manifest,
)
from ds_moe_ep.errors import CheckpointError

_SIZES = st.integers(min_value=0, max_value=2**60)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # no lone surrogates: not UTF-8
_FILE_NAMES = _TEXT.filter(lambda name: is_file_name(name) and name not in _RESERVED)
_RESERVED = (MANIFEST_JSON, INDEX_JSON)
_A = "experts-00001-of-00002.safetensors"
_B = "experts-00002-of-00002.safetensors"


@st.composite
def _manifests(draw):
    names = draw(st.lists(_FILE_NAMES, min_size=2, max_size=6, unique=True))
    own, of_source = names[: len(names) // 2], names[len(names) // 2 :]
    keys = draw(st.lists(_TEXT, max_size=6, unique=True))
    home = {key: draw(st.sampled_from(of_source)) for key in keys}
    metadata = st.dictionaries(_TEXT, _TEXT, max_size=2)
    return Manifest(
        source=SourceSection(
            name=draw(_TEXT),
            files={
                name: SourceFile(
                    metadata=draw(metadata), tensors=[key for key in keys if home[key] == name]
                )
                for name in of_source
            },
            index=draw(st.none() | st.fixed_dictionaries({"metadata": metadata})),
        ),
        plan=PlanSection(ep_size=draw(st.integers(1, 512)), tp_size=1, pp_size=1, dp_size=1),
        files={
            name: FileEntry(
                num_bytes=draw(_SIZES), sha256=draw(st.binary(min_size=32, max_size=32)).hex()
            )
            for name in own
        },
        tensors={
            key: TensorEntry(
                dtype=draw(st.sampled_from(["F32", "BF16", "F8_E4M3"])),
                shape=draw(st.lists(_SIZES, max_size=3)),
                files=draw(st.lists(st.sampled_from(own), min_size=1, unique=True)),
            )
            for key in keys
        },
    )


@given(manifest=_manifests())
def test_what_is_written_is_read_again(tmp_path_factory, manifest):
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / MANIFEST_JSON).write_text(manifest.to_json(), encoding="utf-8")
    assert read_manifest(folder) == manifest


@given(name=_TEXT)
@example("..").via("the folder above")
@example("a/b").via("a folder below")
@example("C:\\x").via("another drive")
@example("a\0b").via("no name at all")
def test_a_file_name_stays_in_its_folder_on_every_system(name):
    if is_file_name(name):
        assert "\0" not in name
        for kind in (PurePosixPath, PureWindowsPath):
            assert (kind("folder") / name).parent == kind("folder")
            assert (kind("folder") / name).name not in ("", "..")


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint of one fused tensor in two expert files, and its manifest's content."""
    for name in (_A, _B):
        save_file({"w": torch.ones(2, 3)}, tmp_path / name)
    size = (tmp_path / _A).stat().st_size
    content = {
        "format": "ds_moe_ep expert-sharded checkpoint",
        "version": 1,
        "source": {
            "name": "m",
            "files": {"model.safetensors": {"metadata": {}, "tensors": ["w"]}},
            "index": None,
        },
        "plan": {"ep_size": 2, "tp_size": 1, "pp_size": 1, "dp_size": 1},
        "files": {name: {"num_bytes": size, "sha256": "0" * 64} for name in (_A, _B)},
        "tensors": {"w": {"dtype": "F32", "shape": [4, 3], "files": [_A, _B]}},
    }
    return tmp_path, content


def _refused(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / MANIFEST_JSON).write_text(text)
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(folder)
    return str(refused.value)


def test_the_pieces_of_a_tensor_are_found_in_order(checkpoint):
    folder, content = checkpoint
    (folder / MANIFEST_JSON).write_text(json.dumps(content))
    files = open_checkpoint(folder)
    assert [piece.path.name for piece in files.tensors["w"]] == [_A, _B]
    assert files.manifest.plan.ep_size == 2


def test_a_newer_version_is_named(checkpoint):
    folder, content = checkpoint
    message = _refused(folder, content | {"version": 2, "whatever": "it knows"})
    assert message == (
        f"{folder / MANIFEST_JSON}: version=2 was written by a newer ds_moe_ep; this one reads "
        "versions up to 1. Update ds_moe_ep."
    )


@pytest.mark.parametrize("content", ["[]", "{}", '{"format": "oci image"}'])
def test_a_manifest_of_something_else(checkpoint, content):
    folder, _ = checkpoint
    assert "not the manifest of an expert-sharded checkpoint" in _refused(folder, content)


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000])
def test_a_corrupt_manifest(checkpoint, content):
    folder, _ = checkpoint
    assert _refused(folder, content).startswith(f"{folder / MANIFEST_JSON}: cannot be read (")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"colour": "red"}, "unknown key 'colour' (known here: files, format, plan, source, "),
        ({"version": "1"}, "version='1': Input should be 1"),
        ({"plan": {}}, "plan.ep_size is missing (and 3 more faults)"),
        ({"tensors": {}}, "the tensors are not those of the source's files"),
        ({"files": {}}, f"tensors lie in {_A}, which is not among the files"),
    ],
)
def test_a_manifest_that_does_not_hang_together(checkpoint, change, expected):
    folder, content = checkpoint
    assert expected in _refused(folder, content | change)


def test_what_may_be_said_of_a_file_is_named(checkpoint):
    folder, content = checkpoint
    content["files"][_A]["md5"] = "0"
    message = _refused(folder, content)
    assert f"unknown key 'files.{_A}.md5' (known here: num_bytes, sha256). Copy" in message


@pytest.mark.parametrize("name", ["../w.safetensors", "/etc/passwd", "..", "a\\b", ""])
@pytest.mark.parametrize("place", ["files", "tensors", "source"])
def test_names_stay_in_the_folder(checkpoint, place, name):
    folder, content = checkpoint
    if place == "tensors":
        content["tensors"]["w"]["files"] = [name]
    else:
        files = content["files"] if place == "files" else content["source"]["files"]
        files[name] = next(iter(files.values()))
    assert "is not the name of a file in this folder" in _refused(folder, content)


@pytest.mark.parametrize("name", [MANIFEST_JSON, INDEX_JSON, "model.safetensors"])
def test_a_file_that_would_be_taken_for_something_else(checkpoint, name):
    folder, content = checkpoint
    content["files"][name] = content["files"][_A]
    assert f"{name} cannot be a file of an expert-sharded checkpoint" in _refused(folder, content)


def test_a_missing_file(checkpoint):
    folder, content = checkpoint
    (folder / _B).unlink()
    assert _refused(folder, content).startswith(f"{folder / _B} is missing, manifest.json says ")


def test_a_truncated_file(checkpoint):
    folder, content = checkpoint
    (folder / _B).write_bytes((folder / _B).read_bytes()[:-4])
    size = content["files"][_B]["num_bytes"]
    assert f"{folder / _B} has {size - 4:,} bytes, manifest.json says {size:,} bytes" in _refused(
        folder, content
    )


@pytest.mark.parametrize(
    "change", [{"shape": [5, 3]}, {"shape": [4, 4]}, {"dtype": "I32"}, {"files": [_A]}]
)
def test_a_tensor_that_is_otherwise_in_the_files(checkpoint, change):
    folder, content = checkpoint
    content["tensors"]["w"].update(change)
    assert "; the files disagree. Convert the model again." in _refused(folder, content)


def test_a_tensor_that_is_in_no_file(checkpoint):
    folder, content = checkpoint
    content["tensors"]["v"] = content["tensors"]["w"]
    content["source"]["files"]["model.safetensors"]["tensors"].append("v")
    assert f"{MANIFEST_JSON} says that v is F32 [4, 3]" in _refused(folder, content)
