"""What the benchmark's tables count, and how they show it."""

import argparse
import json
from pathlib import Path

import pytest
import torch

from ds_moe_ep.bench import (
    balance,
    balance_jobs,
    collectives,
    e2e,
    layer,
    monitor,
    predict,
    replay,
    scale,
)
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.replay import prefill_flops
from ds_moe_ep.bench.replayed_rank import even_ids
from ds_moe_ep.bench.report import Report
from ds_moe_ep.bench.scale import least_bytes
from ds_moe_ep.bench.timing import Spread
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.model_spec import read_model_spec

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "benchmarks.md"
RECORDED = DOCUMENT.parent / "benchmarks"


def cells(text, line):
    return [cell.strip() for cell in text.splitlines()[line].split("|")[1:-1]]


def spread(ms):
    return vars(Spread(ms / 1000, ms / 2000, ms / 500, 5))


def test_a_row_counts_once_for_each_other_rank_and_back():
    # Two experts a rank. Rank 0 has three tokens, rank 1 none, rank 2 one.
    topk_ids = torch.tensor([[0, 1], [2, 3], [3, 5], [4, 0]])
    # Token 0 stays; 1 goes to rank 1 once; 2 to ranks 1 and 2; 3 from rank 2 to rank 0 alone.
    assert least_bytes(topk_ids, [3, 0, 1], 2, row_bytes=10) == 2 * 10 * (0 + 1 + 2 + 1)


def test_one_rank_needs_to_send_nothing():
    assert least_bytes(torch.tensor([[0, 7], [3, 4]]), [2], 8, row_bytes=10) == 0


def layer_result(chosen, **ms):
    seconds = {name: spread(each) for name, each in ms.items()}
    return {
        "world_size": 2,
        "shape": "tiny",
        "routing": "uniform",
        "tokens_per_rank": 4,
        "seconds": seconds,
        "chosen": {"auto": chosen},
    }


def test_a_layer_table_compares_auto_with_the_best_of_each_row():
    results = [
        layer_result(["alltoall"], auto=4.0, alltoall=8.0, allgather=3.2),
        layer_result(["alltoall"], auto=4.0, alltoall=5.0, allgather=8.0),
        layer_result(["allgather"], auto=4.0, alltoall=4.0, allgather=4.0),
    ]
    text = layer.TABLE.to_markdown(results)
    assert cells(text, 0)[-2:] == ["auto / best other", "auto chose"]
    ends = [cells(text, line)[-2:] for line in (2, 3, 4)]
    assert ends == [["1.25", "alltoall"], ["0.80", "alltoall"], ["1.00", "allgather"]]
    assert "1.00 times what the best other" in text
    assert "1.25 times at most" in text
    assert "DeepSpeed" not in text


@pytest.mark.parametrize(
    ("peers", "variant"), [([], ("ours", "our dispatchers alone")), (["DeepSpeed MoE"], None)]
)
def test_without_peers_a_layer_table_is_a_section_of_its_own(peers, variant):
    assert layer.TABLE.variant(argparse.Namespace(peers=peers)) == variant
    assert scale.TABLE.variant(argparse.Namespace(peers=peers)) is None


def test_on_one_rank_a_layer_table_has_no_choice_to_show():
    alone = layer_result([], auto=4.0, alltoall=8.0) | {"world_size": 1, "chosen": {}}
    text = layer.TABLE.to_markdown([alone, layer_result(["alltoall"], auto=4.0, alltoall=8.0)])
    assert cells(text, 0)[-2:] == ["auto / best other", "auto chose"]
    assert [cells(text, line)[-2:] for line in (2, 3)] == [["0.50", "-"], ["0.50", "alltoall"]]


def scale_result(fixed, world_size, total_tokens):
    return {
        "fixed": fixed,
        "world_size": world_size,
        "num_nodes": 1,
        "ranks_share_cores": True,
        "shape": "tiny",
        "total_tokens": total_tokens,
        "least_bytes": 4000.0,
        "sent_bytes": {"auto": 8000.0, "routed rows only": 4200.0},
        "seconds": {"auto": spread(2.0), "routed rows only": spread(3.0)},
    }


def test_scaling_shows_bytes_next_to_the_minimum():
    results = [
        scale_result("per rank", 2, 32),
        scale_result("in all", 2, 512),
        scale_result("per rank", 4, 64),
        scale_result("in all", 4, 512),
    ]
    text = scale.TABLE.to_markdown(results)
    assert [cells(text, line)[:3] for line in range(2, 6)] == [
        ["tokens in all", "2", "512"],
        ["tokens in all", "4", "512"],
        ["tokens per rank", "2", "32"],
        ["tokens per rank", "4", "64"],
    ]
    assert cells(text, 2)[3:] == [
        *("2.0 (1.0 to 4.0)", "3.0 (1.5 to 6.0)"),
        *("4.0", "8.0", "4.2", "2.00", "1.05"),
    ]
    assert "8 experts, top-2, hidden 64, expert width 32" in text
    assert "the slowest rank's. The ranks share the cores of the machine.\n" in text


def test_scaling_on_gpus_or_real_hosts_shares_no_cores():
    text = scale.TABLE.to_markdown([scale_result("in all", 2, 512) | {"ranks_share_cores": False}])
    assert "the slowest rank's.\n" in text


def test_collectives_show_the_rate_of_what_a_rank_gets_and_the_fit():
    price = {"latency_s": 0.001, "s_per_byte": 1e-9}
    flat = {"size": 4, "counts_s": 0.0005, "exchange": price, "gather": price, "reduce": price}
    flat["reduce"] = {"latency_s": 0.002, "s_per_byte": 0.0}
    time = {"collective": "all-gather", "way": "flat", "message_bytes": 65536, **spread(2.0)}
    result = {"world_size": 4, "num_nodes": 1, "times": [time], "fit": {"flat": flat}}
    result |= {"local_s_per_byte": 2e-9, "layers": []}
    text = collectives.TABLE.to_markdown([result])
    assert cells(text, 2) == ["all-gather", "4", "1", "flat", "64", "2.00 (1.00 to 4.00)", "98.3"]
    assert cells(text, -1) == [
        *("flat", "4", "1", "4", "0.500"),
        *("1.000 + 1,000", "1.000 + 1,000", "2.000 + -", "500"),
    ]
    result["local_s_per_byte"] = 0.0  # one that was too short to measure
    assert cells(collectives.TABLE.to_markdown([result]), -1)[-2:] == ["2.000 + -", "-"]
    assert "DeepSpeed" not in text
    seconds = {"shared memory": spread(2.0), "DeepSpeed's shared memory": spread(3.0)}
    result["layers"] = [{"num_tokens": 16, "seconds": seconds}]
    row = "| 4 | 16 | 2.00 (1.00 to 4.00) | 3.00 (1.50 to 6.00) | 1.50 |"
    assert row in collectives.TABLE.to_markdown([result]).splitlines()


@pytest.mark.parametrize(
    "table", [e2e.TABLE, e2e.UNEVEN, monitor.TABLE, predict.TABLE], ids=lambda table: table.name
)
def test_batches_that_ranks_cannot_share_are_refused_before_any_is_measured(table, tmp_path):
    args = asked(table, "--world", "2", "4", "6", "--batch", "12", "16", "--model", "tiny")
    with pytest.raises(ConfigError) as refused:
        table.prepare(args, tmp_path)
    assert str(refused.value) == (
        "--world 6 does not divide --batch 16: every rank generates for as many prompts. Use a "
        "multiple of 12, as --batch 24."
    )
    assert not list(tmp_path.iterdir())
    table.prepare(asked(table, "--world", "1", "2", "--batch", "2", "--model", "tiny"), tmp_path)
    assert (tmp_path / "tiny").is_dir()


def test_a_replicated_batch_need_not_be_shared(tmp_path):
    args = asked(monitor.TABLE, "--batch", "3", "--model", "tiny", "--dispatcher", "allreduce")
    monitor.TABLE.prepare(args, tmp_path)
    assert (tmp_path / "tiny").is_dir()


def asked(table, *arguments):
    parser = argparse.ArgumentParser()
    table.add_arguments(parser)
    return parser.parse_args(arguments)


def test_jobs_of_one_rank_have_no_experts_to_place(tmp_path):
    args = asked(balance_jobs.TABLE, "--world", "2", "1")
    with pytest.raises(ConfigError, match=r"--world 1 has no ranks .* Use 2 or more\."):
        balance_jobs.TABLE.prepare(args, tmp_path)
    balance_jobs.TABLE.prepare(asked(balance_jobs.TABLE, "--world", "2"), tmp_path)


def generated(**sides):
    """Two ranks, of each side's times to the first token and to the last: median, least, most."""
    first_s, all_s = (
        {
            name: vars(Spread(*(ms / 1000 for ms in times[which]), 5))
            for name, times in sides.items()
        }
        for which in (0, 1)
    )
    return {
        **{"world_size": 2, "batch": 16, "prompt_tokens": 32, "all_prompt_tokens": 512},
        **{"new_tokens": 8, "dtype": "float32", "dispatcher": "auto"},
        **{"prefill_s": first_s, "all_s": all_s, "equal_share": dict.fromkeys(sides, 1.0)},
        "peak_bytes": dict.fromkeys(sides, [2_000_000, 1_000_000]),
    }


def test_rates_of_generation_have_the_range_that_the_times_allow():
    text = e2e.TABLE.to_markdown([generated(ours=((200, 160, 256), (600, 416, 800)))])
    assert cells(text, 2) == ["2", "16", "prefill", "2,560 (2,000 to 3,200)"]
    # 128 tokens in 600 - 200 ms; in 800 - 160 at most and 416 - 256 at least.
    assert cells(text, 3) == ["2", "16", "decode", "320 (200 to 800)"]
    text = e2e.TABLE.to_markdown([generated(ours=((200, 160, 416), (600, 416, 800)))])
    assert cells(text, 3)[-1] == "320 (200 to inf)"


def test_rates_are_compared_by_their_medians():
    ours, peer = ((200, 100, 300), (600, 500, 700)), ((500, 100, 800), (1500, 900, 1600))
    text = e2e.TABLE.to_markdown([generated(ours=ours, **{"transformers EP": peer})])
    assert [cells(text, line)[-1] for line in (2, 3)] == ["2.50", "2.50"]


@pytest.mark.parametrize(
    "path",
    sorted([*RECORDED.glob("e2e*.json"), RECORDED / "uneven.json"]),
    ids=lambda path: path.stem,
)
def test_a_recorded_generation_is_shown_as_it_would_be_today(path):
    recorded = json.loads(path.read_text())
    assert recorded["text"] == e2e.TABLE.to_markdown(recorded["results"])
    section = Report(**recorded).to_markdown()
    assert f"<!-- bench {path.stem} -->\n{section}\n<!-- end" in DOCUMENT.read_text()


def test_deepspeeds_shared_memory_is_a_section_of_its_own():
    variants = [
        collectives.TABLE.variant(argparse.Namespace(deepspeed_shm=asked))
        for asked in (True, False)
    ]
    assert variants == [("deepspeed-shm", "and DeepSpeed's shared memory"), None]


def test_the_operations_of_a_prefill(tmp_path):
    SHAPES["tiny"].config().save_pretrained(tmp_path)
    # A layer has four projections of 64 x 64, a router of 8 x 64, two norms of 64 and two of 32 for
    # queries and keys; the model has one norm more. An expert has three matrices of 64 x 32.
    dense = 2 * (4 * 64 * 64 + 8 * 64 + 2 * 64 + 2 * 32) + 64
    attention = 2 * 2 * 64 * 10**2  # each of two layers: two products, half of each masked
    expected = 2 * 10 * dense + 2 * 7 * (3 * 64 * 32) + attention
    assert prefill_flops(read_model_spec(tmp_path), 10, expert_rows=7) == expected


def test_replayed_tokens_choose_different_ranks_and_all_experts_equally():
    ids = even_ids(8, 2, 4, 8, torch.device("cpu"))  # two experts on each of four ranks
    assert ids.flatten().bincount().tolist() == [2] * 8
    assert all(first // 2 != second // 2 for first, second in ids.tolist())


def test_a_rank_outside_of_the_job_is_refused(tmp_path):
    SHAPES["tiny"].config().save_pretrained(tmp_path)
    asked = argparse.Namespace(model=tmp_path, rank=8, world=8)
    with pytest.raises(ConfigError, match=r"--rank=8 .* --world=8. Use 0 to 7\."):
        replay.TABLE.prepare(asked, tmp_path)


def replayed(phase, tokens, mode, ms, floor_s):
    return {
        **{"model": "olmoe", "world_size": 64, "rank": 5, "dtype": "bfloat16"},
        **{"weight_bytes": 1_150_000_000, "bytes_per_s": 4.3e12, "flops": 7.9e14},
        **{"phase": phase, "tokens": tokens, "context": 512, "mode": mode},
        **{"floor": "weights", "floor_s": floor_s, "seconds": spread(ms)},
    }


def test_a_replay_shows_its_share_of_the_floor():
    results = [
        replayed("decode", 8, "eager", 5.4, 0.00027),
        replayed("decode", 8, "CUDA graph", 1.08, 0.00027),
    ]
    text = replay.TABLE.to_markdown(results)
    assert cells(text, 3) == [
        *("decode", "8", "512", "CUDA graph", "1.08 (0.54 to 2.16)", "5.00"),
        *("0.27 (weights)", "25%"),
    ]
    assert "Rank 5 of 64 of olmoe" in text
    assert "no GPU" not in text
    assert "prefill at least 50% of the measured rate: no such row." in text
    without = replay.TABLE.to_markdown([one | {"dtype": "float32"} for one in results])
    assert "There was no GPU" in without and "Bars" not in without


@pytest.mark.parametrize(
    ("graph_ms", "other_graph_ms", "prefill_ms", "verdicts"),
    [
        (1.2, 1.25, 200.0, ["met", "met", "met"]),
        (1.21, 1.0, 200.0, ["**not met**", "met", "met"]),
        (1.0, 1.26, 200.0, ["met", "**not met**", "met"]),
        (1.0, 1.0, 201.0, ["met", "met", "**not met**"]),
    ],
)
def test_a_replay_says_which_bars_are_met(graph_ms, other_graph_ms, prefill_ms, verdicts):
    text = replay.TABLE.to_markdown(
        [
            replayed("decode", 8, "eager", 5.0, 0.00027),
            replayed("decode", 8, "CUDA graph", graph_ms, 0.00027),
            replayed("decode", 32, "eager", 5.0, 0.00027),
            replayed("decode", 32, "CUDA graph", other_graph_ms, 0.00027),
            replayed("prefill", 4096, "eager", prefill_ms, 0.1),
        ]
    )
    bars = text.splitlines()[-1].removeprefix("Bars: ").removesuffix(".").split("; ")
    assert [bar.rsplit(": ", 1)[1] for bar in bars] == verdicts


def test_placed_experts_are_compared_with_contiguous_ones():
    times = {"contiguous": 0.020, "placed, no copies": 0.016}
    result = {
        "world_size": 2,
        "shape": "tiny",
        "routing": "zipf",
        "tokens_per_rank": 40,
        "balancedness": {"contiguous": 0.625, "placed, no copies": 0.9876},
        "seconds": {name: vars(Spread(s, s, s, 3)) for name, s in times.items()},
    }
    lines = balance.TABLE.to_markdown([result]).splitlines()
    # 80 tokens in 20 and in 16 ms.
    assert lines[2] == "| 2 | zipf | contiguous | 0.625 | 20.0 (20.0 to 20.0) | 4,000 | 1.00 |"
    assert lines[3].startswith("| 2 | zipf | placed, no copies | 0.988 | 16.0 ")
    assert lines[3].endswith("| 5,000 | 1.25 |")


def test_jobs_on_placed_experts_are_compared_with_those_on_contiguous_ones():
    jobs = {
        "contiguous": {"balancedness": 0.357, "balancedness_worst_layer": 0.3},
        "placed, 2 spare slots a rank": {"balancedness": 0.97, "balancedness_worst_layer": 0.9},
    }
    for rate, job in zip((200.0, 250.0), jobs.values(), strict=True):
        job["tokens_per_s"] = vars(Spread(rate, rate - 10, rate + 10, 3))
    sizes = {"shape": "tiny", "prompts": 64, "prompt_tokens": 32, "new_tokens": 16}
    result = {"world_size": 4, "routing": "zipf", "hottest_factor": 7.28, "jobs": jobs, **sizes}
    text = balance_jobs.TABLE.to_markdown([result])
    assert text.splitlines()[2:4] == [
        "| 4 | zipf | contiguous | 0.357 | 0.300 | 200 (190 to 210) | 1.00 |",
        "| 4 | zipf | placed, 2 spare slots a rank | 0.970 | 0.900 | 250 (240 to 260) | 1.25 |",
    ]
    assert "7.3 times (zipf)" in text


def test_predictions_stand_beside_what_was_measured():
    price = {"latency_s": 0.001, "s_per_byte": 1e-9}
    launches = {"layer_s": 0.002, "step_s": 0.003, "start_s": 0.004}
    device = {"flops_32bit": 65e9, "bytes_per_s": 6.5e9, "wait_s": 0.0005, "launches": launches}
    memory = {"held_bytes_spread": 0.0}
    for name, predicted, measured in (("held", 100e6, 100e6), ("cache", 1e6, 1e6)):
        memory |= {f"{name}_bytes": measured, f"predicted_{name}_bytes": predicted}
    memory |= {"grown_bytes": 125e6, "predicted_grown_bytes": 120e6, "other_bytes": 5e6}
    step = {"pass": "step", "seconds": spread(100.0), "predicted_s": 0.09}
    first = {"pass": "first", "seconds": spread(100.0), "predicted_s": 0.13}
    shares = {"dense weights": 0.25, "experts": 0.5, "launching": 0.25}
    result = {
        **{"world_size": 2, "num_nodes": 1, "model": "105M", "batch": 16, "prompt_tokens": 32},
        **{"new_tokens": 8, "device": device, "fit": {"flat": {"gather": price, "reduce": price}}},
        **{
            "memory": memory,
            "passes": [one | {"predicted_shares": shares} for one in (first, step)],
        },
    }
    text = predict.TABLE.to_markdown([result])
    assert cells(text, 2)[:7] == [
        *("2", "1", "16", "first", "130.0", "100.0 (50.0 to 200.0)", "+30%"),
    ]
    assert cells(text, 3)[4:] == [
        *("90.0", "100.0 (50.0 to 200.0)", "-10%", "25%", "0%", "50%", "0%", "25%"),
    ]
    assert "Within 25% are 1 of 2 times." in text
    assert "Within 5% are 3 of 3 figures." in text
    assert (
        "| 2 | 1 | 100.00 and 100.00 | +0.0% | 1.00 and 1.00 | +0.0% | 120.00 and 125.00 | -4.0% |"
        in text
    )
    assert cells(text, -1) == [
        *("2", "1", "65.0", "6.50", "2.00", "3.00", "4.00", "1.00", "1.00", "0.50", "1,000"),
    ]
