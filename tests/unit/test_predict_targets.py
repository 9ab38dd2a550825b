"""Targets judged by predictions, measurements read in place of names, and what is refused."""

import json
from dataclasses import asdict, replace

import pytest

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.hostfile import Cluster, Host
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.calibration import read_calibration
from ds_moe_ep.predict.hardware import DEVICES, Device, Launches, find_device, find_link
from ds_moe_ep.predict.passes import Deployment, Pass, predict_pass
from ds_moe_ep.predict.prediction import Question, predict
from ds_moe_ep.predict.targets import Targets, judge_targets, parse_targets
from ds_moe_ep.predict.throughput import Sequences, SequenceTimes, best_batch, fitting_batch
from tests.helpers.launch import REPO

OLMOE = read_model_spec(REPO / "configs" / "olmoe-1b-7b-ep64")
PRICE = Price(40e-6, 1 / 45e9)
LINKS = LinkPrices(GroupPrices(64, 40e-6, exchange=PRICE, gather=PRICE, reduce=PRICE))
MODEL = Deployment(OLMOE, ParallelPlan(64), DEVICES["h200"], LINKS)


def verdicts(text, model=MODEL):
    return {found.target: found for found in judge_targets(model, parse_targets(text, 2048))}


def test_targets_are_read():
    assert parse_targets("latency_ms=8, sequences_per_s=120000,seq_len=512", 2048) == Targets(
        8.0, 120000.0, 512
    )
    assert parse_targets("sequences_per_s=5,new_tokens=7", 2048) == Targets(None, 5.0, 2048, 7)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("latency=8", "'latency' is not one of .* Did you mean latency_ms"),
        ("", "is not one of latency_ms, sequences_per_s, seq_len, new_tokens"),
        ("latency_ms=fast", "latency_ms=fast: a positive number is needed"),
        ("latency_ms=0", "latency_ms=0: a positive number"),
        ("latency_ms=nan", "latency_ms=nan: a positive number"),
        ("latency_ms=8,seq_len=1.5", "seq_len=1.5: a positive number"),
        ("seq_len=5", "neither latency_ms nor sequences_per_s"),
        ("latency_ms=8,seq_len=5,new_tokens=5", "leaves nothing to read .* up to 4"),
    ],
)
def test_targets_that_cannot_be_read_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_targets(text, 2048)


def test_a_latency_is_that_of_one_prompt_a_gpu():
    found = verdicts("latency_ms=8,seq_len=2048,new_tokens=128")["latency_ms=8"]
    step = predict_pass(MODEL, Pass(1, context=2048 - 128 + 64))
    assert found.predicted == pytest.approx(step.seconds * 1e3)
    assert found.is_met is (step.seconds <= 8e-3)
    assert found.limit == step.bound
    read = verdicts("latency_ms=8,seq_len=2048")["latency_ms=8"]
    assert read.predicted == pytest.approx(
        predict_pass(MODEL, Pass(1, 2048, is_first=True, is_scored=True)).seconds * 1e3
    )


def test_a_target_is_met_up_to_just_so_many_tokens():
    found = verdicts("latency_ms=8,sequences_per_s=120000,seq_len=2048")
    for name, kept in (
        ("latency_ms=8", lambda times: times.prefill.seconds <= 8e-3),
        ("sequences_per_s=120000", lambda times: times.sequences_per_s >= 120000),
    ):
        length = found[name].met_up_to_tokens
        assert 0 < length < 2048
        assert not found[name].is_met
        pick = best_batch if name.startswith("seq") else lambda m, s: SequenceTimes(m, s, 1)
        assert kept(pick(MODEL, Sequences(length, 0)))
        assert not kept(pick(MODEL, Sequences(length + 1, 0)))
    both = found["all together"]
    assert (
        0
        < both.met_up_to_tokens
        <= min(found[name].met_up_to_tokens for name in found if name != "all together")
    )


def test_easy_targets_are_met_up_to_the_longest_context():
    found = verdicts("latency_ms=1e6,sequences_per_s=1,seq_len=100")
    assert [one.is_met for one in found.values()] == [True] * 3
    assert {one.met_up_to_tokens for one in found.values()} == {OLMOE.max_position_embeddings}


def test_each_target_can_be_met_and_both_together_not():
    alone = SequenceTimes(MODEL, Sequences(512, 0), 1)
    many = best_batch(MODEL, Sequences(512, 0))
    latency_ms = alone.prefill.seconds * 1e3 * 1.01
    rate = many.sequences_per_s * 0.999
    found = verdicts(f"latency_ms={latency_ms},sequences_per_s={rate},seq_len=512")
    assert [one.is_met for one in found.values()] == [True, True, False]
    assert found["all together"].batch == 0


def test_memory_is_the_limit_where_nothing_fits():
    tiny = replace(DEVICES["h200"], memory_bytes=4 * 10**9)
    model = replace(MODEL, device=tiny)
    assert fitting_batch(model, Sequences(4000, 0)) == 0
    found = verdicts("latency_ms=8,seq_len=4000", model)["latency_ms=8"]
    assert (found.predicted, found.batch, found.limit) == (None, 0, "memory capacity")
    assert found.met_up_to_tokens > 0  # shorter ones fit


# Measurements


def written(tmp_path, table, results):
    path = tmp_path / f"{table}.json"
    path.write_text(json.dumps({"table": table, "results": results}))
    return path


def links_result(world_size=64, num_nodes=8):
    fit = {"flat": asdict(LINKS.flat), "across": asdict(LINKS.flat), "within": asdict(LINKS.flat)}
    return {
        "world_size": world_size,
        "num_nodes": num_nodes,
        "fit": fit,
        "local_s_per_byte": 1e-9,
    }


def test_links_that_were_measured_are_used(tmp_path):
    path = written(tmp_path, "collectives-hosts", [links_result(), links_result(16, 2)])
    found = read_calibration([path]).links(64, 8)
    assert found == LinkPrices(LINKS.flat, LINKS.flat, LINKS.flat, 1e-9)
    assert read_calibration([path]).device(DEVICES["h100"], 64) == DEVICES["h100"]
    with pytest.raises(
        ConfigError, match=r"has links of 16 on 2, 64 on 8 ranks on hosts.* 32 on 4"
    ):
        read_calibration([path]).links(32, 4)
    assert read_calibration([path]).links(32, 4, is_needed=False) is None


@pytest.mark.parametrize(
    ("named", "told"),
    [
        ({"gpu": "h200", "link": "ib-200g"}, ["nvlink4 within a host", "ib-200g between hosts"]),
        (
            {"gpu": "h200", "host_link": "nvlink3"},
            ["nvlink3 within a host", "ib-400g between hosts (assumed"],
        ),
        ({"gpu": "h200"}, None),
    ],
)
def test_links_that_are_named_stand_in_for_those_not_measured(tmp_path, named, told):
    path = written(tmp_path, "collectives-hosts", [links_result(16, 2)])
    hosts = tuple(Host(f"worker-{i}", tuple(range(8))) for i in range(8))
    asked = ParallelPlan(64), OLMOE, Cluster(hosts, "test"), Question(calibration=[path], **named)
    if told is None:
        with pytest.raises(ConfigError, match="or name the hardware: --host-link, --link"):
            predict(*asked)
        return
    found = predict(*asked)
    links = found.hardware[1:]
    assert [line[: len(start)] for line, start in zip(links, told, strict=True)] == told
    assert found.batches


def test_links_that_were_measured_go_before_those_named(tmp_path):
    path = written(tmp_path, "collectives-hosts", [links_result()])
    hosts = tuple(Host(f"worker-{i}", tuple(range(8))) for i in range(8))
    question = Question(gpu="h200", link="ib-200g", calibration=[path])
    found = predict(ParallelPlan(64), OLMOE, Cluster(hosts, "test"), question)
    assert found.hardware[1:] == (f"links: measured, {path}",)


def test_the_recorded_links_of_this_repository_can_be_used():
    folder = REPO / "docs" / "benchmarks"
    found = read_calibration([folder / "collectives.json", folder / "collectives-hosts.json"])
    assert found.links(8, 1).flat.size == 8
    assert found.links(64, 8).across.size == 8


def test_a_device_that_was_measured_is_used_for_as_many_ranks(tmp_path):
    device = Device("measured", 5.0, 6.0, 7.0, Launches(1.0, 2.0, 3.0), 8, 9, False, "here", True)
    result = {**links_result(4, 1), "device": asdict(device)}
    calibration = read_calibration([written(tmp_path, "predict", [result])])
    assert calibration.device(None, 4) == device
    assert calibration.links(4, 1).flat == LINKS.flat
    with pytest.raises(ConfigError, match="has a device of 4 ranks, but the plan needs 8"):
        calibration.device(None, 8)


def replayed(**kwargs):
    result = {
        **{"world_size": 64, "num_layers": 16, "dtype": "bfloat16", "flops": 7e14},
        **{"bytes_per_s": 4e12, "floor_s": 0.001, "phase": "decode", "mode": "eager"},
        **{"tokens": 8, "seconds": {"median": 0.009}},
    }
    return {**result, **kwargs}


def test_a_replayed_rank_tells_the_rates_and_what_launching_costs(tmp_path):
    results = [
        replayed(),
        replayed(tokens=1, seconds={"median": 0.008}),
        replayed(tokens=1, mode="eager, CUDA graph", seconds={"median": 0.002}),
    ]
    calibration = read_calibration([written(tmp_path, "replay", results)])
    found = calibration.device(DEVICES["h200"], 64)
    assert (found.flops_16bit, found.bytes_per_s) == (7e14, 4e12)
    assert found.flops_32bit == DEVICES["h200"].flops_32bit
    assert found.launches.layer_s == pytest.approx(0.008 / 16)  # of the fewest tokens, eager
    # Of a graph, what reading the weights does not explain, over the operations of 16 layers.
    assert found.kernel_s == pytest.approx(0.001 / (16 * 77 + 18))
    assert found.memory_bytes == DEVICES["h200"].memory_bytes
    on_cpu = [{**result, "dtype": "float32"} for result in results]
    found = read_calibration([written(tmp_path, "replay", on_cpu)]).device(None, 64)
    assert found.launches.layer_s == pytest.approx(0.007 / 16)  # reading takes its own time
    assert not found.overlaps


def test_the_recorded_replay_of_this_repository_can_be_used():
    found = read_calibration([REPO / "docs" / "benchmarks" / "replay.json"]).device(None, 64)
    assert found.overlaps
    # The published figures of the GPU that it was recorded on are what such a GPU reaches.
    assert found.flops_16bit == pytest.approx(DEVICES["h200"].flops_16bit, rel=0.05)
    assert found.bytes_per_s == pytest.approx(DEVICES["h200"].bytes_per_s, rel=0.05)
    assert found.kernel_s == pytest.approx(DEVICES["h200"].kernel_s, rel=0.05)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory. Write one with launch/bench.py predict"),
        ("{", "not a file of results"),
        ("[1]", "not a file of results"),
        ('{"table": "e2e", "results": [{}]}', "is of the table 'e2e', not of predict, replay"),
        ('{"table": "collectives", "results": [{"fit": 1}]}', "results are not as expected"),
        ('{"table": "predict", "results": [{"device": {"x": 1}}]}', "results are not as expected"),
        ('{"table": "replay", "results": [{}]}', "results are not as expected"),
    ],
)
def test_files_that_are_not_measurements_are_refused(content, message, tmp_path):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_calibration([path])


def test_unknown_hardware_is_refused_with_what_is_known():
    with pytest.raises(ConfigError, match=r"--gpu h20: not one of h200, .* Did you mean h200\?"):
        find_device("h20")
    with pytest.raises(ConfigError, match=r"--link ib-40g: not one of .* Did you mean ib-400g"):
        find_link("--link", "ib-40g", DEVICES["h200"])
    assert find_link("--host-link", None, DEVICES["a100-80g"]).name == "nvlink3"
