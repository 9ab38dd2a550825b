"""Verdicts on a run of round numbers, against values and reasons worked out by hand."""

import copy

import pytest

from ds_moe_ep.monitor import verdicts
from ds_moe_ep.monitor.findings import (
    balance_of,
    hot_experts,
    kind_latencies,
    pass_parts,
    rows_per_pass,
    slow_rank,
)
from ds_moe_ep.monitor.metrics_folder import read_metrics
from ds_moe_ep.monitor.page import key_figures, page
from ds_moe_ep.monitor.verdicts import Targets, judge
from tests.helpers.metrics import large_metrics, small_metrics, write_metrics_folder

_MIB = 2**20


def _metrics(tmp_path, change=lambda files: None):
    files = copy.deepcopy(small_metrics())
    change(files)
    return read_metrics(write_metrics_folder(tmp_path, files))


def _judged(tmp_path, change=lambda files: None):
    return {verdict.name: verdict for verdict in judge(_metrics(tmp_path, change))}


def _set_all(files, **values):
    for rank in files["metrics.jsonl"]:
        rank |= values


def test_the_values_of_the_small_run(tmp_path):
    found = {name: (each.state, each.value) for name, each in _judged(tmp_path).items()}
    assert found == {
        "GPU utilisation": ("missed", pytest.approx((0.5 + 0.6 + 0.7 + 0.8) / 4)),
        "memory variance": ("missed", pytest.approx((110 - 100) / 102.5)),
        "collective latency": ("missed", 0.002),
        "balancedness": ("missed", pytest.approx(0.75)),
        "latency of a decode pass": ("missed", pytest.approx(0.23)),
        "sequences a second": ("open", pytest.approx(12 / 10)),
        "memory efficiency": ("open", None),
    }


def test_the_reasons_of_the_small_run(tmp_path):
    reasons = {name: each.reason for name, each in _judged(tmp_path).items()}
    # (3 * 3 + 1) / 4 = 2.5 s of 10 s in collectives.
    assert reasons["GPU utilisation"] == (
        "from 50% to 80%; CPU run: CPU time of each process by wall time stands for GPU "
        "utilisation; collectives, with waiting, take 25% of the run; the others wait for rank 3; "
        "batches are small (2 prompts a rank)"
    )
    # 400 rows, the mean is 250.
    assert reasons["memory variance"] == (
        "peaks from 100 MiB (rank 0) to 110 MiB (rank 3); rank 3 has 1.60x the mean of expert rows"
    )
    assert reasons["collective latency"] == (
        "all-gather is slowest; p95 4.00 ms, max 8.00 ms; waiting, not links: rank 3, which the "
        "others wait for, takes 500 us; CPU run, without the links of GPUs"
    )
    assert reasons["balancedness"] == (
        "worst passes 0.60 (1 to 10), worst layer 0.55 (layer 3), rows of the whole run 0.62; "
        "skewed router: expert 7 of layer 3 takes 3.00x the mean"
    )
    # Of 3 * 7 + 7 = 28 s in decode passes 10 are in experts, 10 in dispatch and combine.
    assert reasons["latency of a decode pass"] == (
        "p95 250 ms, max 300 ms; CPU run; experts take 36% of a pass, dispatch and combine, "
        "waiting included 36%"
    )
    assert reasons["sequences a second"] == (
        "12 prompts of 36.7 tokens, new ones included; 4 CPU ranks cannot show what 64 GPUs do"
    )
    assert "ranks share the memory of their host" in reasons["memory efficiency"]


def test_the_slow_rank_is_the_one_that_waits_least(tmp_path):
    slow = slow_rank(_metrics(tmp_path))
    assert slow is not None
    assert (slow.rank, slow.host, slow.wait_s, slow.wait_share) == (3, "node-b", 2.0, 0.2)
    assert slow.why == "its experts take 2.00 s longer, with 2.00x the others' expert rows"


@pytest.mark.parametrize(
    ("part", "rows", "says"),
    [
        ("experts", 200, "no more expert rows than the others: its device is slower, or shared"),
        ("attention", 400, "its attention takes 3.00 s longer, with no more tokens of its own"),
        (None, 400, "no part of its passes takes longer than the others', so it starts them later"),
    ],
)
def test_what_makes_a_rank_slow(tmp_path, part, rows, says):
    def change(files):
        slow = files["metrics.jsonl"][3]
        slow["expert_rows"] = rows
        decode = slow["parts_s"]["decode"]
        decode["experts"] = 2.0
        if part is not None:
            decode[part] += 3.0

    assert says in slow_rank(_metrics(tmp_path, change)).why


def test_ranks_that_wait_alike_are_not_slow(tmp_path):
    assert slow_rank(_metrics(tmp_path, lambda files: _set_all(files, comm_s=1.0))) is None


def _is_good(files):
    _set_all(files, utilisation=0.96, comm_s=1.0, expert_rows=250, peak_memory_bytes=90 * _MIB)
    files["run.json"] |= {"device": "NVIDIA H200", "available_memory_bytes": 100 * _MIB}
    for rank in files["metrics.jsonl"]:
        rank["collectives"]["gather"]["p50_s"] = 0.0009
        rank["pass_s"]["decode"] = {"p50": 0.008, "p95": 0.009, "max": 0.1}
    for window in files["balance.jsonl"]:
        window |= {"overall": 1.0, "layers": [1.0, 1.0]}


@pytest.fixture
def targets_of_four_gpus(monkeypatch):
    monkeypatch.setattr(verdicts, "TARGETS", Targets(num_gpus=4, sequences_per_s=1.2))


@pytest.mark.usefixtures("targets_of_four_gpus")
def test_a_run_that_meets_every_target(tmp_path):
    found = _judged(tmp_path, _is_good)
    assert {verdict.state for verdict in found.values()} == {"met"}
    assert found["memory efficiency"].value == pytest.approx(0.9)
    assert found["memory efficiency"].measured == "90.0%"
    assert "CPU" not in " ".join(verdict.reason for verdict in found.values())


@pytest.mark.usefixtures("targets_of_four_gpus")
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("GPU utilisation", lambda files: _set_all(files, utilisation=0.949)),
        # A target of "less than" is missed by what equals it: (max - min) / mean is 5% here.
        (
            "memory variance",
            lambda files: [
                rank.update(peak_memory_bytes=size)
                for rank, size in zip(files["metrics.jsonl"], (975, 1000, 1000, 1025), strict=True)
            ],
        ),
        (
            "collective latency",
            lambda files: files["metrics.jsonl"][2]["collectives"]["gather"].update(p50_s=0.001),
        ),
        ("balancedness", lambda files: files["balance.jsonl"][0].update(overall=0.97)),
        (
            "latency of a decode pass",
            lambda files: files["metrics.jsonl"][1]["pass_s"]["decode"].update(p50=0.00801),
        ),
        ("sequences a second", lambda files: files["metrics.jsonl"][0].update(run_s=10.1)),
        ("memory efficiency", lambda files: _set_all(files, peak_memory_bytes=87 * _MIB)),
    ],
)
def test_each_target_is_missed_by_a_little(tmp_path, name, change):
    def nearly_good(files):
        _is_good(files)
        change(files)

    found = _judged(tmp_path, nearly_good)
    assert found[name].state == "missed"


@pytest.mark.parametrize(("batch", "says"), [(12, "12"), (1250, "1,250")])
def test_large_batches_are_told_in_digits(tmp_path, batch, says):
    def change(files):
        files["run.json"] |= {"device": "NVIDIA H200", "available_memory_bytes": 1000 * _MIB}
        for sample in files["samples.jsonl"]:
            sample["batch_size"] = batch

    reason = _judged(tmp_path, change)["memory efficiency"].reason
    assert f"there is room for larger batches than {says} prompts a rank" in reason


def test_an_idle_gpu_waits_for_its_host(tmp_path):
    reason = _judged(tmp_path, lambda files: files["run.json"].update(device="NVIDIA H200"))
    assert "a GPU is idle while its host prepares" in reason["GPU utilisation"].reason
    assert "GPU is idle" not in _judged(tmp_path, _is_good)["GPU utilisation"].reason


def test_links_are_slow_where_even_the_rank_that_waits_least_is(tmp_path):
    def change(files):
        files["metrics.jsonl"][3]["collectives"]["gather"]["p50_s"] = 0.0015

    reason = _judged(tmp_path, change)["collective latency"].reason
    assert "slow links: even rank 3, which waits least, takes 1.50 ms for 2.00 KiB" in reason


def test_uneven_passes_of_an_even_run_are_chance(tmp_path):
    def change(files):
        _set_all(files, expert_rows=250)
        files["experts.jsonl"][1]["tokens_per_expert"] = [40] * 8

    # 1000 rows in 2 layers on 4 ranks in 40 passes.
    reason = _judged(tmp_path, change)["balancedness"].reason
    assert "chance: 3.12 rows a rank, layer and pass are few; over the whole run" in reason
    assert "router" not in reason


def test_without_skew_or_chance_the_busiest_rank_is_named(tmp_path):
    def change(files):
        files["experts.jsonl"][1]["tokens_per_expert"] = [40] * 8

    assert "rank 3 computes 1.60x the mean of rows" in (
        _judged(tmp_path, change)["balancedness"].reason
    )


@pytest.mark.parametrize(
    ("num_experts", "loads", "says"),
    [
        # Contiguous: 130 and three times 30, 55 / 130. Each rank needs two, so the least possible
        # most is 70 + 15.
        (8, [70, 60, 15, 15, 15, 15, 15, 15], "from 0.42 to 0.65"),
        # One expert a rank: 30 / 90. In two slots: a quarter of 90 on each, besides 10, 10, 5, 5.
        (4, [90, 10, 10, 10], "from 0.33 to 0.92"),
        (8, [120, 20, 30, 30, 30, 30, 30, 30], None),  # the hot one is too hot for any place
    ],
)
def test_a_placement_that_would_help_is_named(tmp_path, num_experts, loads, says):
    def change(files):
        files["run.json"]["num_experts"] = num_experts
        files["experts.jsonl"] = [
            {"layer": 1, "tokens_per_expert": [40] * num_experts},
            {"layer": 3, "tokens_per_expert": loads},
        ]

    reason = _judged(tmp_path, change)["balancedness"].reason
    command = f"ds-moe-ep balance {tmp_path}"
    if num_experts == 4:
        command += " --slots-per-rank 2"
    if says is None:
        assert "ds-moe-ep balance" not in reason
    else:
        assert f"bring layer 3 {says} over the whole run: {command}" in reason


def test_a_placement_that_was_run_is_to_be_made_anew(tmp_path):
    reason = _judged(tmp_path, lambda files: files["run.json"].update(slots_per_rank=3))
    told = "experts were placed by the loads of another run; by these: "
    command = f"ds-moe-ep balance {tmp_path} --slots-per-rank 3"
    assert reason["balancedness"].reason.endswith(told + command)


@pytest.mark.parametrize(("device", "state"), [("cpu", "open"), ("NVIDIA H200", "missed")])
def test_cpus_are_not_judged_by_the_throughput_of_as_many_gpus(tmp_path, device, state):
    files = large_metrics()
    files["run.json"]["device"] = device
    metrics = read_metrics(write_metrics_folder(tmp_path, files))
    found = {verdict.name: verdict for verdict in judge(metrics)}["sequences a second"]
    assert (found.state, found.value) == (state, pytest.approx(64 * 1440 / 120))
    told = "; 64 CPU ranks cannot show what 64 GPUs do"
    assert found.reason.endswith(told) is (device == "cpu")


def test_collectives_of_replayed_passes_are_said_not_to_be_timed(tmp_path):
    def change(files):
        _set_all(files, num_replays=38)

    told = "38 of 40 passes were replayed: their collectives are not timed"
    found = _judged(tmp_path, change)
    assert found["collective latency"].reason.endswith(f"; {told}")
    assert "of the run" not in found["GPU utilisation"].reason
    assert _section_of(page(_metrics(tmp_path, change), []), "Communication").count(told) == 1

    def none_timed(files):
        change(files)
        _set_all(files, collectives={})

    found = _judged(tmp_path, none_timed)["collective latency"]
    assert (found.state, found.reason) == ("open", told)
    assert f"<p>{told}.</p>" in page(_metrics(tmp_path, none_timed), [])
    assert "replayed" not in page(_metrics(tmp_path), judge(_metrics(tmp_path)))


def _section_of(text, heading):
    return text.partition(f"<h2>{heading}</h2>")[2].partition("</section>")[0]


@pytest.mark.parametrize(("task", "has_first"), [("generate", True), ("score", False)])
def test_scored_prompts_have_no_first_token(tmp_path, task, has_first):
    found = key_figures(_metrics(tmp_path, lambda files: files["run.json"].update(task=task)))
    assert ("first token, p50" in found) is has_first


def test_passes_of_a_rank_that_split_none_are_not_counted(tmp_path):
    def change(files):
        rank = files["metrics.jsonl"][3]
        rank["num_passes"]["decode"] = 1
        rank["parts_s"]["decode"] = dict.fromkeys(rank["parts_s"]["decode"], 0.0)

    parts = pass_parts(_metrics(tmp_path, change), "decode")
    # Of the other three: 38 passes each, of which experts took 2 s.
    assert parts["experts"] == pytest.approx(2 / 38)
    assert sum(parts.values()) == pytest.approx(7 / 38)


def test_rows_of_a_pass_are_those_that_ranks_computed(tmp_path):
    def change(files):
        files["run.json"]["batch_mode"] = "replicated"
        _set_all(files, expert_rows=640)  # each the rows of all 320 tokens of each layer

    assert rows_per_pass(_metrics(tmp_path, change)) == pytest.approx(640 / (2 * 40))


def test_what_was_not_measured_is_said(tmp_path):
    def change(files):
        files["run.json"] |= {"task": "score", "device": "NVIDIA H200"}
        files["balance.jsonl"] = []
        _set_all(files, collectives={}, pass_s={"prefill": None, "decode": None}, num_prompts=0)

    found = _judged(tmp_path, change)
    open_ones = {name: each.reason for name, each in found.items() if each.state == "open"}
    assert open_ones == {
        "collective latency": "no collective took place",
        "balancedness": "no pass was recorded",
        "latency of a decode pass": "no decode pass: prompts are scored",
        "sequences a second": "no prompt was served",
        "memory efficiency": "peak of 102 MiB a rank; what a rank could have had was not recorded",
    }
    assert not any(found[name].measured for name in open_ones)


def test_one_rank_is_not_compared_with_others(tmp_path):
    def change(files):
        files["run.json"]["hosts"] = ["node-a"]
        files["run.json"]["plan"] |= {"ep_size": 1, "world_size": 1, "dense_dp_size": 1}
        files["metrics.jsonl"] = files["metrics.jsonl"][:1]
        files["samples.jsonl"] = [each for each in files["samples.jsonl"] if each["rank"] == 0]

    found = _judged(tmp_path, change)
    assert found["memory variance"].state == found["balancedness"].state == "open"
    assert "1 CPU rank cannot show" in found["sequences a second"].reason
    assert "wait" not in found["GPU utilisation"].reason


def test_findings_of_the_small_run(tmp_path):
    metrics = _metrics(tmp_path)
    assert [str(hot) for hot in hot_experts(metrics)] == [
        "expert 7 of layer 3 takes 3.00x the mean",
        "expert 0 of layer 1 takes 1.00x the mean",
    ]
    balance = balance_of(metrics)
    assert balance is not None
    assert (balance.worst_layer, balance.of_worst_layer) == (3, pytest.approx(0.55))
    assert balance.of_whole_run == pytest.approx(250 / 400)
    (latency,) = kind_latencies(metrics)
    assert (latency.count, latency.sent_bytes) == (320, 320 * 2048)
    assert (latency.p50_s, latency.max_s) == (0.002, 0.008)
    assert (latency.least_p50_s, latency.least_rank) == (0.0005, 3)
