"""A real Prometheus that asks our exporter, and is asked what the dashboard asks."""

import json
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request

import pytest

from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.metrics_format import BalanceWindow, Sample
from ds_moe_ep.monitor.prometheus import Exporter
from tests.helpers.launch import REPO, free_port
from tests.helpers.metrics import small_metrics

_PROMETHEUS = shutil.which("prometheus")
pytestmark = pytest.mark.skipif(
    _PROMETHEUS is None, reason="needs Prometheus: sudo apt-get install -y prometheus"
)

_PATIENCE_S = 60.0
_NUM_RANKS = 4


@pytest.fixture
def exporter():
    port = free_port()
    exporter = Exporter(port)
    yield exporter, port
    exporter.close()


@pytest.fixture
def prometheus(exporter, tmp_path):
    """Asks the exporter ten times a second; its address."""
    port = free_port()
    config = tmp_path / "prometheus.yml"
    target = {"job_name": "job", "static_configs": [{"targets": [f"127.0.0.1:{exporter[1]}"]}]}
    times = {"scrape_interval": "100ms", "scrape_timeout": "100ms"}
    config.write_text(json.dumps({"global": times, "scrape_configs": [target]}))  # YAML holds JSON
    options = [f"--config.file={config}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [_PROMETHEUS, *options, f"--web.listen-address=127.0.0.1:{port}"], stderr=log
        )
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_PATIENCE_S)
    finally:
        process.kill()


def _ask(address, expression):
    """Returns the values by rank; empty without any, or where nobody listens yet."""
    query = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{address}/api/v1/query?{query}", timeout=10) as answer:
            series = json.load(answer)["data"]["result"]
    except urllib.error.HTTPError as error:
        assert error.code == 503, error.read()  # any other is said of the question
        return {}
    except OSError:
        return {}
    return {each["metric"].get("rank"): float(each["value"][1]) for each in series}


def _questions():
    """Returns what the dashboard asks, and whether it wants to know it of every rank."""
    dashboard = json.loads((REPO / "configs" / "grafana-dashboard.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    return {target["expr"]: "{{rank}}" in target["legendFormat"] for target in targets}


def test_every_question_of_the_dashboard_is_answered(exporter, prometheus):
    samples = [Sample.model_validate(line) for line in small_metrics()["samples.jsonl"]]
    window = BalanceWindow(first_step=1, last_step=8, overall=0.75, layers=[0.9, 0.5])
    deadline = time.monotonic() + _PATIENCE_S
    for second in range(10):  # of the job; here it takes until Prometheus has seen it
        now = samples[second * _NUM_RANKS : (second + 1) * _NUM_RANKS]
        exporter[0].update(JobNow(now, window))
        step = now[0].step
        while _ask(prometheus, "ds_moe_ep_step").get("0") != step:
            assert time.monotonic() < deadline, f"step {step} was not seen"
            time.sleep(0.05)
    questions = _questions()
    answers = {expression: _ask(prometheus, expression) for expression in questions}
    ranks = {str(rank) for rank in range(_NUM_RANKS)}
    for expression, is_of_ranks in questions.items():
        assert answers[expression].keys() == (ranks if is_of_ranks else {None}), expression
    assert answers["avg(ds_moe_ep_utilisation_ratio)"] == {None: pytest.approx(0.65)}
    assert answers["sum(ds_moe_ep_prompts_queued)"] == {None: 0}
    # Of 8 collectives a second, which take 20 ms, on rank 3 12 ms.
    (latency,) = (found for asked, found in answers.items() if " / " in asked)
    assert latency == pytest.approx({"0": 0.0025, "1": 0.0025, "2": 0.0025, "3": 0.0015})
    rates = [found for asked, found in answers.items() if asked.startswith(("rate", "deriv"))]
    assert len(rates) == 4 and all(min(found.values()) > 0 for found in rates)
