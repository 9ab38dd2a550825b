"""What Prometheus gets, and that the dashboard asks for nothing else."""

import json
import re
import socket
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ds_moe_ep.engine.options import parse_options
from ds_moe_ep.errors import ResourceError
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.metrics_format import BalanceWindow, Sample
from ds_moe_ep.monitor.prometheus import Exporter
from tests.helpers.launch import REPO, free_port


def _sample(rank: int) -> Sample:
    return Sample(
        t_s=10.0,
        rank=rank,
        utilisation=0.5 + rank / 10,
        memory_bytes=1000 + 500 * rank,
        step=7,
        new_tokens=100 * (rank + 1),
        prompts_done=rank,
        prompts_queued=3,
        batch_size=2,
        collectives=40,
        collectives_s=0.5 + rank,
        at="batch 1 of 2",
    )


_WINDOW = BalanceWindow(first_step=1, last_step=8, overall=0.75, layers=[0.9, 0.5])


def _scrape(samples, window=_WINDOW):
    port = free_port()
    exporter = Exporter(port)
    try:
        exporter.update(JobNow(samples, window))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            text = answer.read().decode()
    finally:
        exporter.close()
    with socket.socket() as again:  # the port is given back
        again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        again.bind(("127.0.0.1", port))
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_every_rank_is_served_and_the_job_as_a_whole():
    families = _scrape([_sample(0), _sample(1)])
    values = {
        (sample.name, sample.labels.get("rank")): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["ds_moe_ep_new_tokens_total", "1"] == 200
    assert values["ds_moe_ep_utilisation_ratio", "0"] == 0.5
    assert values["ds_moe_ep_collectives_total", "1"] == 40
    assert values["ds_moe_ep_collective_seconds_total", "1"] == 1.5
    assert values["ds_moe_ep_tokens_per_second", None] == (100 + 200) / 10
    assert values["ds_moe_ep_memory_variance", None] == pytest.approx(500 / 1250)
    assert values["ds_moe_ep_balancedness", None] == 0.75
    assert values["ds_moe_ep_balancedness_worst_layer", None] == 0.5


def test_before_the_first_window_there_is_no_balance():
    assert not any("balance" in name for name in _scrape([_sample(0)], None))


def test_the_number_of_series_is_bounded():
    families = _scrape([_sample(rank) for rank in range(64)])
    assert sum(len(family.samples) for family in families.values()) == 64 * 9 + 4


def test_the_dashboard_asks_for_series_that_there_are():
    families = _scrape([_sample(0)])
    names = {sample.name for family in families.values() for sample in family.samples}
    dashboard = json.loads((REPO / "configs" / "grafana-dashboard.json").read_text())
    asked = [t["expr"] for panel in dashboard["panels"] for t in panel["targets"]]
    found = {name for expr in asked for name in re.findall(r"ds_moe_ep_\w+", expr)}
    assert found == names  # and shows all of them


def test_a_taken_port_is_refused():
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=f"--metrics-port {port}: .* free on rank 0"):
            Exporter(port)


@pytest.mark.parametrize("port", ["0", "-1", "65536", "99999"])
def test_a_port_that_there_is_not_is_refused_at_once(capsys, port):
    files = ["--model", "m", "--input", "i", "--output", "o"]
    assert parse_options([*files, "--metrics-port", "65535"]).metrics_port == 65535
    with pytest.raises(SystemExit) as ended:
        parse_options([*files, f"--metrics-port={port}"])
    assert ended.value.code == 2
    told = f"argument --metrics-port: {port} is not a port: use 1 to 65535"
    assert told in capsys.readouterr().err
