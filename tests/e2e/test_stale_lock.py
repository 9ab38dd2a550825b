"""DeepSpeed's CPU op that is built just in time: no job builds it, and no job waits for it.

A build that is killed leaves a lock behind, on which every later one waits for ever.
"""

import os
from pathlib import Path

import pytest
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
from torch.utils.cpp_extension import _get_build_directory

from tests.helpers import launch_infer

pytestmark = pytest.mark.slow


@pytest.fixture
def launch(tiny_model, write_prompts, tmp_path):
    """Returns a function that runs a job of two ranks to its good end."""

    def run(extensions: Path, **env: str) -> None:
        prompts = write_prompts(tmp_path / "in.jsonl", {"a": [5, 6]})
        files = ["--input", prompts, "--output", tmp_path / "out.jsonl", "--max-new-tokens", "1"]
        result = launch_infer(
            ["--model", tiny_model("olmoe"), *files],
            num_ranks=2,
            env=env,
            extensions_dir=extensions,
            timeout_s=120,
        )
        assert result.returncode == 0, result.stdout + result.stderr

    return run


def test_a_stale_lock_holds_nobody_up(launch, tmp_path, monkeypatch):
    extensions = tmp_path / "extensions"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(extensions))
    lock = Path(_get_build_directory(ShareMemCommBuilder().name, verbose=False)) / "lock"
    lock.touch()
    launch(extensions)
    assert [path for path in extensions.rglob("*") if path.is_file()] == [lock]


def test_nothing_is_built(launch, tmp_path):
    extensions, calls, compiler = tmp_path / "new", tmp_path / "calls", tmp_path / "compiler"
    compiler.write_text(f'#!/bin/sh\necho "$0 $*" >> {calls}\nexit 1\n')
    compiler.chmod(0o755)
    for name in ("ninja", "c++", "g++"):  # DeepSpeed tries C libraries with cc; that is no build
        (tmp_path / name).symlink_to(compiler)
    launch(extensions, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}", CXX=str(compiler))
    assert not extensions.exists()
    assert not calls.exists(), calls.read_text()
