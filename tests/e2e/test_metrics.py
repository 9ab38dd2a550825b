"""A job that is watched: what it writes, what Prometheus gets, what DeepSpeed's monitor gets."""

import csv
import json
import sys
import threading
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ds_moe_ep.monitor.metrics_folder import read_metrics
from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import free_port

pytestmark = pytest.mark.slow

_PROMPTS = {f"p{i}": [3 + (7 * i + j) % (VOCAB_SIZE - 3) for j in range(1 + i)] for i in range(7)}
_NEW_TOKENS = 40


@pytest.fixture
def args(tiny_model, write_prompts, tmp_path):
    prompts = write_prompts(tmp_path / "in.jsonl", _PROMPTS)
    options = ["--model", tiny_model("olmoe"), "--input", prompts, "--batch-size", "2"]
    options += ["--output", tmp_path / "out.jsonl", "--max-new-tokens", str(_NEW_TOKENS)]
    return [*options, "--metrics", tmp_path / "metrics"]


def _scrape(port: int, texts: list[str], until: threading.Event) -> None:
    while not until.is_set():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
                texts.append(answer.read().decode())
        except OSError:
            pass
        time.sleep(0.01)


def test_a_watched_job_writes_what_it_did(args, tmp_path):
    config = tmp_path / "ds.json"
    section = {"enabled": True, "output_path": str(tmp_path / "csv"), "job_name": "job"}
    config.write_text(json.dumps({"csv_monitor": section, "tensorboard": {"enabled": False}}))
    port, texts, done = free_port(), [], threading.Event()
    scraper = threading.Thread(target=_scrape, args=(port, texts, done))
    scraper.start()
    try:
        options = ["--metrics-port", str(port), "--config", config]
        result = launch_infer([*args, *options], num_ranks=2, is_forked=True)
    finally:
        done.set()
        scraper.join()
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = read_metrics(tmp_path / "metrics")
    completions = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    new_tokens = sum(len(each["token_ids"]) for each in completions)
    prompt_tokens = sum(map(len, _PROMPTS.values()))
    assert [rank.rank for rank in metrics.ranks] == [0, 1]
    assert sum(rank.new_tokens for rank in metrics.ranks) == new_tokens
    # All but the last token of each completion went through the layers once, each to top_k experts.
    live = metrics.run.top_k * (prompt_tokens + new_tokens - len(_PROMPTS))
    assert {sum(load) for load in metrics.expert_loads.values()} == {live}
    assert sum(rank.num_passes.prefill for rank in metrics.ranks) == 4  # batches of 2, 2 and 2, 1
    for rank in metrics.ranks:
        assert rank.collectives["gather"].count or rank.collectives["exchange"].count
        spent_s = sum(vars(rank.parts_s.prefill).values()) + sum(vars(rank.parts_s.decode).values())
        assert 0 < spent_s < rank.run_s
    last = {sample.rank: sample for sample in metrics.samples}
    assert last.keys() == {0, 1}
    for rank in metrics.ranks:
        assert last[rank.rank].collectives == sum(c.count for c in rank.collectives.values())
        assert last[rank.rank].collectives_s == pytest.approx(rank.comm_s, abs=1e-4)
    assert all(0 < window.overall <= 1 for window in metrics.windows)
    borders = [(window.first_step, window.last_step) for window in metrics.windows]
    assert borders[0][0] == 1 and borders[-1][1] == metrics.ranks[0].num_steps
    assert [phase.verdict for phase in metrics.bring_up].count("fail") == 0
    assert metrics.run.predicted_memory_bytes and metrics.run.available_memory_bytes

    written = list((tmp_path / "csv").rglob("*.csv"))
    rows = {path.stem: list(csv.reader(path.open())) for path in written}
    (done_rows,) = (lines for name, lines in rows.items() if name.endswith("prompts_done"))
    assert float(done_rows[-1][-1]) == len(_PROMPTS)

    families = {f.name: f for text in texts for f in text_string_to_metric_families(text)}
    # The job may be over before a second look; the series are there from the first.
    assert {"ds_moe_ep_utilisation_ratio", "ds_moe_ep_memory_bytes"} <= families.keys(), texts
    assert {s.labels["rank"] for s in families["ds_moe_ep_memory_bytes"].samples} <= {"0", "1"}


@pytest.mark.parametrize("dispatcher", ["auto", "alltoall"])
def test_scores_count_no_new_tokens_and_a_replicated_batch_counts_once(args, tmp_path, dispatcher):
    options = ["--task", "score", "--batch-mode", "replicated", "--dispatcher", dispatcher]
    result = launch_infer([*args, *options], num_ranks=2, is_forked=True)
    assert result.returncode == 0, result.stdout + result.stderr
    metrics = read_metrics(tmp_path / "metrics")
    live = metrics.run.top_k * sum(map(len, _PROMPTS.values()))
    assert {sum(load) for load in metrics.expert_loads.values()} == {live}
    assert {sample.new_tokens for sample in metrics.samples} == {0}
    done = {sample.rank: sample.prompts_done for sample in metrics.samples}  # the last of each
    assert done == {0: len(_PROMPTS), 1: 0}


def test_a_port_in_use_is_refused(args):
    import socket

    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = launch_infer([*args, "--metrics-port", port], num_ranks=2, is_forked=True)
    assert result.returncode == 1, result.stdout + result.stderr
    assert result.stderr.count(f"--metrics-port {port}: ") == 1, result.stderr
    assert "Traceback" not in result.stderr


def test_a_monitor_section_that_deepspeed_refuses_is_refused(args, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"csv_monitor": {"enabled": True, "output_pth": "x"}}))
    result = launch_infer([*args, "--config", config], num_ranks=2, is_forked=True)
    assert result.returncode == 2, result.stdout + result.stderr
    assert "csv_monitor.output_pth" in result.stderr and "Traceback" not in result.stderr


def test_a_monitor_that_cannot_start_is_refused_on_every_rank_at_once(args, tmp_path):
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_path": str(tmp_path / "file"), "job_name": "tiny"}
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"csv_monitor": section}))
    result = launch_infer([*args, "--config", config], num_ranks=2, is_forked=True)
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.count("csv_monitor: ") == 1, result.stderr
    assert "Not a directory" in result.stderr and "Traceback" not in result.stderr


def test_a_report_can_be_made_of_it(args, tmp_path):
    assert launch_infer(args, num_ranks=2, is_forked=True).returncode == 0
    report = run_command([sys.executable, "-m", "ds_moe_ep", "report", tmp_path / "metrics"])
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "metrics" / "report.html").stat().st_size > 10_000
