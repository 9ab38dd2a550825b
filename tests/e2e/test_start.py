"""The order of a job's start: what earlier runs have left goes when nothing can be refused."""

import json
import socket
import sys
from pathlib import Path

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

pytestmark = pytest.mark.slow

_INFER = REPO / "launch" / "infer.py"
# infer.py, but another job takes the output while this one loads.
_OVERTAKEN = """
import runpy, sys
from ds_moe_ep import infer_job as job
from ds_moe_ep.engine.journal import Journal
load, other = job.load_engine, []
def load_slowly(options, *args):
    other.append(Journal(options.journal_folder, rank=0))
    other[0].start({"of": "another"}, resume=True)
    return load(options, *args)
job.load_engine = load_slowly
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.fixture
def start(write_prompts, tmp_path):
    """Runs a job of one rank with a model and more arguments, beside what a run has left."""
    prompts, output = write_prompts(tmp_path / "in.jsonl", {"a": [5], "b": [7]}), _output(tmp_path)
    partial = output.with_name("out.jsonl.partial")
    partial.mkdir()
    (partial / "job.json").write_text("{}")
    (partial / "rank-00000.jsonl").write_text("\n[0, {}]")
    (tmp_path / ".out.jsonl.1.tmp").write_text("half")

    def run(model: Path, *args: str | Path, script: tuple[Path, ...] = (_INFER,)):
        command = [sys.executable, *script, "--model", model]
        command += ["--input", prompts, "--output", output, *args]
        return run_command(command, env={"DS_ACCELERATOR": "cpu"}, timeout_s=180, is_forked=True)

    return run


def _output(folder: Path) -> Path:
    return folder / "out.jsonl"


def _check_as_it_was(folder: Path) -> None:
    partial = folder / "out.jsonl.partial"
    kept = {path.name: path.read_text() for path in partial.iterdir()}
    assert kept == {"job.json": "{}", "rank-00000.jsonl": "\n[0, {}]"}
    assert (folder / ".out.jsonl.1.tmp").read_text() == "half"
    assert not _output(folder).exists()


def test_a_model_that_graphs_cannot_hold_leaves_finished_prompts(start, tiny_model, tmp_path):
    result = start(tiny_model("gpt_oss"), "--cuda-graphs")
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("ConfigError: --cuda-graphs: GptOssForCausalLM has layers")
    assert "swapped" not in result.stdout  # no weight was read
    _check_as_it_was(tmp_path)


def test_a_port_that_is_taken_leaves_finished_prompts(start, tiny_model, tmp_path):
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        result = start(tiny_model("olmoe"), "--metrics-port", str(port))
    assert result.returncode == 1, result.stdout + result.stderr
    assert f"--metrics-port {port}" in result.stderr
    _check_as_it_was(tmp_path)


def test_a_job_that_is_overtaken_leaves_the_other_s_metrics(start, tiny_model, tmp_path):
    script, metrics = tmp_path / "overtaken.py", tmp_path / "metrics"
    script.write_text(_OVERTAKEN)
    metrics.mkdir()
    (metrics / "samples.jsonl").write_text("of another")
    result = start(tiny_model("olmoe"), "--metrics", metrics, script=(script, _INFER))
    assert result.returncode == 2, result.stdout + result.stderr
    assert "another job is writing this output" in result.stderr
    assert (metrics / "samples.jsonl").read_text() == "of another"
    assert not _output(tmp_path).exists()


def test_one_new_token_has_no_pass_to_replay(start, tiny_model, tmp_path):
    result = start(tiny_model("olmoe"), "--cuda-graphs", "--max-new-tokens", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "--cuda-graphs is ignored: --max-new-tokens 1 has no decode passes" in result.stderr
    assert "replays" not in result.stdout
    lines = [json.loads(line) for line in _output(tmp_path).read_text().splitlines()]
    assert [(line["id"], len(line["token_ids"])) for line in lines] == [("a", 1), ("b", 1)]
    assert not (tmp_path / "out.jsonl.partial").exists()
    assert not (tmp_path / ".out.jsonl.1.tmp").exists()
