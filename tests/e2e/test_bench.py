"""launch/bench.py writes every table, with what it measured: not how fast, which is no test's."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.predict.calibration import read_calibration
from tests.helpers import run_command
from tests.helpers.launch import REPO

pytestmark = pytest.mark.slow

TINY = {
    "load": ("--world", "2", "--models", "tiny"),
    "layer": ("--world", "2", "--shape", "tiny", "--tokens", "4", "--routing", "uniform"),
    "overlap": ("--world", "2", "--tokens", "4"),
    "balance": (
        *("--world", "2", "--shape", "tiny", "--tokens", "4", "--routing", "zipf"),
        *("--spare", "0", "1"),
    ),
    "balance-jobs": (
        *("--world", "2", "--shape", "tiny", "--routing", "zipf", "--spare", "1"),
        *("--prompts", "4", "--prompt-tokens", "3", "--new-tokens", "2"),
    ),
    "scale": ("--world", "2", "--shape", "tiny", "--tokens", "4", "--total-tokens", "6"),
    "collectives": ("--world", "2", "--message-kib", "1"),
    "e2e": (
        *("--world", "2", "--model", "tiny", "--batch", "2"),
        *("--prompt-tokens", "4", "--new-tokens", "2"),
    ),
    "uneven": (
        *("--world", "2", "--model", "tiny", "--batch", "4", "--least-tokens", "1"),
        *("--prompt-tokens", "6", "--new-tokens", "2"),
    ),
    "monitor": (
        *("--world", "2", "--model", "tiny", "--batch", "2"),
        *("--prompt-tokens", "4", "--new-tokens", "2"),
    ),
    "replay": (
        *("--world", "4", "--rank", "3", "--tokens", "2"),
        *("--context", "5", "--prefill", "9"),
    ),
    # A step is the difference of two generations: of few tokens it may be lost in noise.
    "predict": (
        *("--world", "2", "--model", "tiny", "--batch", "2"),
        *("--prompt-tokens", "4", "--new-tokens", "16"),
    ),
}
SPREAD = {"median", "min", "max", "num_rounds"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder and the end of each table's command; two run at a time."""
    folder = tmp_path_factory.mktemp("bench")
    SHAPES["tiny"].config().save_pretrained(folder / "model")

    def write(table):
        out = folder / table
        args = [*TINY[table], "--rounds", "1", "--out", out]
        if table == "replay":
            args += ["--model", folder / "model"]
        script = REPO / "launch" / "bench.py"
        command = [sys.executable, script, table, *args]
        return out, run_command(command, timeout_s=300.0, is_forked=True)

    with ThreadPoolExecutor(max_workers=2) as pool:
        return {table: pool.submit(write, table) for table in TINY}


@pytest.fixture(params=TINY)
def results(request, written):
    """The results of one table, its document checked."""
    out, ended = written[request.param].result()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    report = json.loads((out / "benchmarks" / f"{request.param}.json").read_text())
    name = "planning.md" if request.param == "predict" else "benchmarks.md"
    document = (out / name).read_text()
    assert report["text"] in document
    assert f"python launch/bench.py {request.param} " in document
    assert report["results"]
    return request.param, report["results"]


def spreads(value):
    """All spreads of times in results, however deep."""
    if isinstance(value, dict):
        if value.keys() >= SPREAD:
            return [value]
        value = list(value.values())
    return [found for each in value for found in spreads(each)] if isinstance(value, list) else []


def test_a_table_is_written_with_times(results):
    table, found = results
    times = spreads(found)
    assert times
    assert all(0.0 < time["min"] <= time["median"] <= time["max"] for time in times)
    assert all(time["num_rounds"] == 1 for time in times)
    assert {result["world_size"] for result in found} == {4 if table == "replay" else 2}


def test_the_sent_bytes_are_at_most_a_tenth_above_the_minimum(written):
    out, _ = written["scale"].result()
    found = json.loads((out / "benchmarks" / "scale.json").read_text())["results"]
    assert [result["total_tokens"] for result in found] == [8, 6]
    for result in found:
        least = result["least_bytes"]
        assert least <= result["sent_bytes"]["routed rows only"] <= 1.1 * least
        assert result["sent_bytes"]["auto"] >= least


def test_weights_and_cache_are_predicted_to_the_byte_and_the_file_calibrates_a_plan(written):
    out, _ = written["predict"].result()
    path = out / "benchmarks" / "predict.json"
    (found,) = json.loads(path.read_text())["results"]
    memory = found["memory"]
    assert memory["predicted_held_bytes"] == memory["held_bytes"]
    assert memory["predicted_cache_bytes"] == memory["cache_bytes"]
    calibration = read_calibration([path])
    assert calibration.links(2, 1).flat.size == 2
    assert calibration.device(None, 2).bytes_per_s > 0
