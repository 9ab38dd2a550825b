"""The table of a replayed rank: what is committed is what the recorded one gives, misses too."""

import json
import math
import shutil
import subprocess
import sys

import pytest

from ds_moe_ep.bench import predict_replay
from ds_moe_ep.errors import ConfigError
from tests.helpers.launch import REPO

RECORDED = REPO / "docs" / "benchmarks"


def written(tmp_path, change):
    recorded = json.loads((RECORDED / "replay.json").read_text())
    change(recorded)
    (tmp_path / "replay.json").write_text(json.dumps(recorded))
    return tmp_path


def row(text, beginning):
    (line,) = [each for each in text.splitlines() if each.startswith(f"| {beginning} |")]
    return [cell.strip() for cell in line.split("|")[4:-1]]


def test_the_committed_table_is_what_the_recorded_one_gives():
    document = (REPO / "docs" / predict_replay.DOCUMENT).read_text()
    begin, end = "<!-- bench predict-replay -->\n", "\n<!-- end of bench predict-replay -->"
    section = document.split(begin)[1].split(end)[0]
    assert section == predict_replay.to_markdown(RECORDED)


def test_the_command_writes_the_section(tmp_path):
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(RECORDED / "replay.json", tmp_path / "benchmarks")
    command = [sys.executable, REPO / "launch" / "bench.py", "predict-replay", "--out", tmp_path]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert predict_replay.to_markdown(RECORDED) in (tmp_path / "planning.md").read_text()


def test_a_row_counted_by_hand(tmp_path):
    def slower(recorded):
        for each in recorded["results"]:
            seconds = 0.05 if each["mode"] == "eager" else 0.01
            each["seconds"] = {"median": seconds, "min": seconds, "max": seconds, "num_rounds": 1}

    text = predict_replay.to_markdown(written(tmp_path, slower))
    # 77 operations of each of 16 layers and 18 around them, 6 us each, without messages.
    assert row(text, "decode | 1 | eager")[:3] == ["50.00 (50.00 to 50.00)", "7.50", "-85%"]
    # What is measured of the one row is what is predicted of all that launching bounds.
    assert row(text, "decode | 8 | eager")[3:] == ["50.00", "+0%"]
    # 2.5 us each, in a graph, and at 4.32 TB/s what one token reads and moves: dense weights
    # without the embedding, the cache, written once, and in each layer the rank's expert, which of
    # 64 tokens 8 choose on average, with variance 7, and more on the busiest of 64 ranks.
    dense = 476_710_912 - 50304 * 2048 + 16 * 20 * 2048
    cache = (513 + 1) * 16 * 2 * 2048
    rows = 8 + math.sqrt(2 * math.log(64) * 7)
    experts = 16 * (6_291_456 + rows * (5 * 2048 + 6 * 1024))
    predicted_ms = (16 * 77 + 18) * 2.5e-3 + 2 * (dense + cache + experts) / 4.32e9
    assert row(text, "decode | 1 | eager, CUDA graph")[1] == f"{predicted_ms:.2f}"


def test_rows_that_figures_were_taken_from_are_not_counted(tmp_path):
    def only_these(recorded):
        recorded["results"] = recorded["results"][:4]  # of one token a rank

    text = predict_replay.to_markdown(written(tmp_path, only_these))
    assert "Within 25% are 0 of 1 times by the figures of `--gpu h200`" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: found["machine"].update(gpus="no GPU"), "with no GPU, not with one of h200"),
        (lambda found: found["results"][0].update(model="mine"), "model mine, which has no folder"),
    ],
)
def test_what_nothing_is_known_of_is_refused(change, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        predict_replay.to_markdown(written(tmp_path, change))


def test_a_replay_that_was_not_recorded_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"replay\.json is not there. docs/benchmarks.md has"):
        predict_replay.to_markdown(tmp_path)
