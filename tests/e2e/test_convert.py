"""`ds-moe-ep convert` as a user runs it: there, back, checked, killed, refused, and then run."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ds_moe_ep.checkpoint.header import StoredTensor, make_header
from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO

_COMMAND = [sys.executable, "-m", "ds_moe_ep", "convert"]
_NEW_TOKENS = 6
_ELEMENT_BYTES = 4
_JOURNAL = "unfinished.jsonl"


def _convert(*args, is_forked=True):
    return run_command([*_COMMAND, *args], timeout_s=300, is_forked=is_forked)


def _refused(*args):
    result = _convert(*args)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert "Traceback" not in result.stderr
    return result.stderr.strip()


@pytest.fixture(scope="module")
def converted(tiny_model, tmp_path_factory):
    """A tiny model and its expert-sharded checkpoint of 4 expert files; no test may change it."""
    target = tmp_path_factory.mktemp("converted") / "ep"
    command = [tiny_model("olmoe"), target, "--to", "ep", "--ep-size", "4"]
    result = _convert(*command, is_forked=False)  # as users do, once
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"wrote {target}: 8 files, ")
    assert result.stderr == ""  # no progress bar, which is for terminals
    return tiny_model("olmoe"), target


def test_back_and_the_thin_script(converted, tmp_path):
    source, target = converted
    script = [sys.executable, REPO / "launch" / "convert.py"]
    result = run_command([*script, target, tmp_path / "hf", "--to", "hf"])
    assert result.returncode == 0, result.stderr
    for path in source.iterdir():
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes()
    AutoModelForCausalLM.from_pretrained(tmp_path / "hf")


def test_verify_names_the_corrupt_file_and_exits_2(converted, tmp_path):
    _, whole = converted
    result = _convert(whole, "--verify")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{whole} is whole: 8 files, ")
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    name = "experts-00003-of-00004.safetensors"
    content = bytearray((damaged / name).read_bytes())
    content[-5] ^= 16
    (damaged / name).write_bytes(content)
    message = _refused(damaged, "--verify")
    assert message.startswith(f"CheckpointError: {damaged}: 1 of 7 files are corrupt")
    assert f": {name}. Copy them again" in message
    (damaged / name).unlink()
    assert f"{damaged / name} is missing" in _refused(damaged, "--verify")


def test_the_format_of_deepspeed(tiny_model, tmp_path):
    target = tmp_path / "deepspeed"
    result = _convert(tiny_model("olmoe"), target, "--to", "deepspeed")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"wrote {target}: 28 files, ")
    tag = target / (target / "latest").read_text()
    assert (tag / "layer_2_expert_7_mp_rank_00_model_states.pt").is_file()
    assert f"{target} is a checkpoint of DeepSpeed" in _refused(target, tmp_path, "--to", "hf")


def test_pickled_weights(tiny_model, tmp_path):
    source, target = tmp_path / "pickled", tmp_path / "hf"
    shutil.copytree(tiny_model("olmoe"), source)
    (source / "model.safetensors").unlink()
    tensors = load_file(tiny_model("olmoe") / "model.safetensors")
    torch.save(tensors, source / "pytorch_model.bin")
    assert "DST --to hf --allow-pickle" in _refused(source, target, "--to", "ep")
    result = _convert(source, target, "--to", "hf", "--allow-pickle")
    assert (result.returncode, result.stderr) == (0, "")
    found = load_file(target / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)


@pytest.mark.slow
@pytest.mark.parametrize("num_ranks", [2, 1])
def test_infer_runs_it_on_any_number_of_ranks(converted, write_prompts, tmp_path, num_ranks):
    source, target = converted
    ids = torch.randint(3, VOCAB_SIZE, (3, 5), generator=torch.Generator().manual_seed(0)).tolist()
    prompts = write_prompts(tmp_path / "in.jsonl", dict(zip("abc", ids, strict=True)))
    files = ["--model", target, "--input", prompts, "--output", tmp_path / "out.jsonl"]
    result = launch_infer(
        [*files, "--max-new-tokens", str(_NEW_TOKENS)], num_ranks=num_ranks, is_forked=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["a", "b", "c"]
    for prompt, line in zip(ids, lines, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=_NEW_TOKENS, do_sample=False
        )
        assert line["token_ids"] == expected[0, len(prompt) :].tolist()


@pytest.fixture
def large(tiny_model, tmp_path):
    """Returns a function that makes a model of about that many bytes out of a tiny one.

    Its experts are wider, with nothing in them: they take no disk.
    """

    def make(num_bytes):
        folder = tmp_path / "large"
        shutil.copytree(tiny_model("olmoe"), folder)
        config = json.loads((folder / "config.json").read_text())
        path = folder / "model.safetensors"
        shapes = {key: tuple(tensor.shape) for key, tensor in load_file(path).items()}
        experts = [key for key in shapes if ".experts." in key]
        width = num_bytes // (len(experts) * config["hidden_size"] * _ELEMENT_BYTES)
        for key in experts:
            shapes[key] = tuple(
                width if size == config["intermediate_size"] else size for size in shapes[key]
            )
        config["intermediate_size"] = width
        (folder / "config.json").write_text(json.dumps(config))
        sizes = {key: math.prod(shape) * _ELEMENT_BYTES for key, shape in shapes.items()}
        stored = {key: (StoredTensor(path, 0, sizes[key], "F32", shapes[key]),) for key in shapes}
        header = make_header({"format": "pt"}, stored.items())
        path.write_bytes(header)
        os.truncate(path, len(header) + sum(sizes.values()))
        return folder

    return make


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(large, tmp_path):
    free_bytes = shutil.disk_usage(tmp_path).free
    message = _refused(large(free_bytes + 2**36), tmp_path / "ep", "--to", "ep")
    assert message.startswith(f"CheckpointError: {tmp_path / 'ep'} needs ")
    assert "too few. Free them, or name a folder on another disk." in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large"]


def test_a_kill_costs_no_more_than_the_file_it_was_at(large, tmp_path):
    source, target, partial = large(400_000_000), tmp_path / "ep", tmp_path / "ep.partial"
    command = [*map(str, [*_COMMAND, source, target]), "--to", "ep", "--ep-size", "8"]
    with subprocess.Popen(command, cwd=REPO, start_new_session=True) as process:
        try:
            _wait_until(lambda: len(_finished(partial)) >= 2, process)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not target.exists()
    kept = {name: (partial / name).stat().st_ino for name in _finished(partial)}
    assert len(kept) < 9
    assert "has no manifest.json" in _refused(partial, "--verify")

    result = _convert(source, target, "--to", "ep", "--ep-size", "8")
    assert result.returncode == 0, result.stderr
    assert {name: (target / name).stat().st_ino for name in kept} == kept
    assert not partial.exists()
    assert _convert(target, "--verify").returncode == 0


def _finished(partial):
    """Names of the files that the journal says are done."""
    with contextlib.suppress(FileNotFoundError):
        return re.findall(r'"name": "([^"]+)".*}$', (partial / _JOURNAL).read_text(), re.MULTILINE)
    return []


def _wait_until(condition, process, timeout_s=120.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline, "nothing was written"
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["SRC"], "one of the arguments --to --verify is required"),
        (["SRC", "--to", "ep"], "--verify takes SRC alone; --to takes SRC and DST"),
        (["SRC", "DST", "--verify"], "--verify takes SRC alone; --to takes SRC and DST"),
        (["SRC", "DST", "--to", "gguf"], "argument --to: invalid choice: 'gguf'"),
        (["SRC", "DST", "--to", "hf", "--ep-size", "2"], "--ep-size is for --to ep only"),
        (["SRC", "DST", "--to", "deepspeed", "--ep-size", "2"], "--ep-size is for --to ep only"),
        (["SRC", "--verify", "--allow-pickle"], "--trust-remote-code are for --to only"),
        (["SRC", "DST", "--to", "hf"], "CheckpointError: SRC: no such folder. Name an"),
        (["SRC", "--verify"], "CheckpointError: SRC: no such folder. Name an"),
        (["SRC", "DST", "--to", "ep"], "model.safetensors.index.json. Name a model directory; of"),
    ],
)
def test_arguments_that_make_no_sense(args, expected):
    assert expected in _refused(*args)
