"""The judgements of the bring-up's phases, on figures worked out by hand."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep import host_memory
from ds_moe_ep.bringup.distribution import (
    WorkCost,
    balance_of_schedule,
    check_balance,
    check_dispatcher,
    choose_dispatcher,
)
from ds_moe_ep.bringup.experts import check_room_for_output, judge_experts, judge_hosts
from ds_moe_ep.bringup.host_pairs import judge_pairs, rounds
from ds_moe_ep.bringup.memory import (
    RankMemory,
    choose_batch_size,
    judge_batch,
    judge_room_for_weights,
    judge_spread,
    judge_weights,
)
from ds_moe_ep.bringup.report import FAIL, PASS, WARN, Check, PhaseReport, judged, write_jsonl
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.engine.options import parse_options
from ds_moe_ep.engine.schedule import Batch, spread
from ds_moe_ep.memory_needs import BatchNeeds, kv_bytes_per_token, largest_batch, weight_bytes
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny, save_tiny
from tests.helpers.launch import REPO
from tests.unit.test_survey import _facts

_MIB, _GIB = 1 << 20, 1 << 30

# Reports


def test_a_phase_is_as_good_as_its_worst_check(tmp_path):
    good, poor, bad = (Check(name, name, f"is {name}") for name in (PASS, WARN, FAIL))
    assert PhaseReport(1, (good,)).verdict == PASS
    assert PhaseReport(2, (good, poor)).verdict == WARN
    report = PhaseReport(4, (poor, bad, good), 1.5)
    assert (report.verdict, report.failed) == (FAIL, [bad])
    assert report.to_text().splitlines() == [
        "[4/4] fine-tune memory: fail (1.50 s)",
        "      warn  warn            is warn",
        "      fail  fail            is fail",
        "      pass  pass            is pass",
    ]
    path = tmp_path / "new" / "bringup.jsonl"
    write_jsonl(path, [report, PhaseReport(1, (good,))])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["phase"], line["verdict"]) for line in lines] == [(4, FAIL), (1, PASS)]
    assert [each.name for each in path.parent.iterdir()] == ["bringup.jsonl"]


def test_a_missed_target_is_a_warning_that_says_why():
    assert judged("x", 1.0, 1.0, "ms", "took 1", missed="Slow").verdict == PASS
    missed = judged("x", 1.1, 1.0, "ms", "took 1.1", missed="Slow")
    assert (missed.verdict, missed.reason) == (WARN, "took 1.1. Slow")


# Phase 1


def _held(*ranges: range, layers=("l0", "l1"), num_experts=4):
    return [{name: (own, num_experts) for name in layers} for own in ranges]


def test_the_union_of_experts_is_all_of_them_once():
    whole = judge_experts(_held(range(0, 2), range(2, 4)), 2)
    assert whole.verdict == PASS
    assert "2 ranks hold 8 experts of 2 layers, each once: 4 a rank, 2 of a layer" in whole.reason
    copies = judge_experts(_held(range(0, 2), range(2, 4), range(0, 2), range(2, 4)), 2)
    assert copies.verdict == PASS
    assert "once in each of 2 groups" in copies.reason


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (_held(range(0, 2), range(3, 4)), "expert 2 of l0 is nowhere"),
        (_held(range(0, 3), range(2, 4)), "expert 2 of l0 is on ranks [0, 1]"),
        (_held(range(0, 2), range(2, 5)), "expert 4 of l0 is on ranks [1]"),
        ([*_held(range(0, 2)), *_held(range(2, 4), layers=("l0",))], "expert 2 of l1 is nowhere"),
    ],
)
def test_experts_that_are_not_there_once_are_named(held, says):
    check = judge_experts(held, 2)
    assert check.verdict == FAIL
    assert says in check.reason


def test_hosts_of_a_job_that_differ_are_all_named():
    facts = [
        _facts(),
        _facts(model_files={}, code_sha256=None),
        _facts(python="3.9.0"),
        _facts(model_files=None),
    ]
    checks = judge_hosts(facts, ["a", "a", "b", "c"], [0, 0, 1, 2], "/m")
    assert [(check.name, check.verdict) for check in checks] == [
        ("hosts", PASS),
        ("b", FAIL),
        ("c", FAIL),
    ]
    assert checks[0].reason.startswith("1 of 3: ")
    assert "Python 3.9.0, not 3.11.2" in checks[1].reason
    assert "no model folder /m" in checks[2].reason


def test_results_need_room(tmp_path):
    assert check_room_for_output(tmp_path, 1000).verdict == PASS
    check = check_room_for_output(tmp_path, 1 << 60)
    assert check.verdict == WARN
    assert "make room, or name another --output" in check.reason
    assert check_room_for_output(tmp_path / "nowhere", 1 << 60).verdict == PASS  # not known


# Phase 2


@given(st.integers(2, 40))
def test_all_pairs_meet_once_in_few_rounds(num_hosts):
    found = rounds(num_hosts)
    assert len(found) == num_hosts - 1 + num_hosts % 2
    pairs = [pair for each in found for pair in each]
    assert sorted(pairs) == [(a, b) for a in range(num_hosts) for b in range(a + 1, num_hosts)]
    for each in found:
        busy = [host for pair in each for host in pair]
        assert len(busy) == len(set(busy))


def test_the_slowest_pair_is_named_and_compared():
    hosts = ["a", "b", "c"]
    even = judge_pairs({(0, 1): 0.1, (0, 2): 0.15, (1, 2): 0.1}, hosts, 64)
    assert even.verdict == PASS
    assert "slowest is a - c: 0.15 ms one way, 64 B; 1.5 times the median of 3 pairs" in even.reason
    odd = judge_pairs({(0, 1): 0.1, (0, 2): 0.1, (1, 2): 0.9}, hosts, 64)
    assert odd.verdict == WARN
    assert "slowest is b - c" in odd.reason
    assert "--exclude c" in odd.reason
    assert (even.measured, even.target, even.unit) == (0.15, 0.2, "ms")
    alone = judge_pairs({(0, 1): 5.0}, hosts, 64)  # nothing to compare with
    assert (alone.verdict, alone.measured, alone.target, alone.unit) == (PASS, 5.0, None, "ms")
    assert alone.reason == "slowest is a - b: 5 ms one way, 64 B; there is no other pair"


# Phase 3


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (WorkCost(2.0, 5.0), 2.5),
        (WorkCost(2.0, 0.001), 0.05),
        (WorkCost(0.001, 50.0), 1000.0),
        (WorkCost(-0.1, 5.0), 1.0),
        (WorkCost(0.1, 0.0), 1.0),
    ],
)
def test_a_new_tokens_cost_in_tokens_of_a_prompt(cost, expected):
    assert cost.new_token_cost == expected


def test_dear_new_tokens_even_out_the_number_of_prompts():
    """With new tokens that cost nothing, the short prompts all go to one rank."""
    lengths = [10, 1, 1, 1]

    def counts(cost: float) -> list[int]:
        schedule = spread(lengths, 2, 8, max_new_tokens=10, new_token_cost=cost)
        return [sum(len(batch.indices) for batch in batches) for batches in schedule]

    assert counts(0.0) == [1, 3]
    assert counts(3.0) == [2, 2]


def test_balance_is_the_mean_over_the_highest_load():
    schedule = [[Batch((0,)), Batch((1,))], [Batch((2,))]]
    assert balance_of_schedule(schedule, [1.0, 2.0, 6.0].__getitem__) == pytest.approx(4.5 / 6)
    assert balance_of_schedule([[], []], lambda index: 1.0) == 1.0
    assert check_balance(0.75, 3, 2, None).verdict == WARN
    assert check_balance(0.95, 3, 2, WorkCost(1.0, 2.0)).verdict == PASS


def _layer(name, dispatcher=None, ep_size=4):
    experts = SimpleNamespace(
        dispatcher=dispatcher,
        describe_dispatch=lambda: name,
        experts=torch.nn.Linear(1, 1, dtype=torch.bfloat16),
    )
    return SimpleNamespace(deepspeed_moe=experts, ep_size=ep_size, hidden_size=16)


@pytest.mark.parametrize(
    ("name", "asked", "ep_size", "why"),
    [
        ("allreduce", "auto", 4, "replicated batches use it"),
        ("allreduce", "allreduce", 4, "as asked for"),
        ("alltoall", "alltoall", 4, "as asked for"),
        ("alltoall", "alltoall", 1, "one rank a group, nothing travels"),
    ],
)
def test_a_dispatcher_is_told_with_who_chose_it(name, asked, ep_size, why):
    check = check_dispatcher(_layer(name, ep_size=ep_size), 5, 2, asked)
    assert (check.verdict, check.reason) == (PASS, f"{name}: {why}")


def test_auto_is_told_with_what_a_decode_step_is_predicted_to_take():
    # Each rank gets 15 rows of the others with their routing, of 48 bytes, in a millisecond; sums
    # take no time, and numbers of rows a quarter of a second.
    free, dear = Price(0.0, 0.0), Price(0.0, 1e-3 / (15 * 48))
    prices = LinkPrices(GroupPrices(4, 0.25, exchange=free, gather=dear, reduce=free))
    auto = Auto(Links(Communicator(None)), prices, num_local_experts=2)
    check = check_dispatcher(_layer("auto", auto), 5, 2, "auto")
    assert (check.verdict, check.reason) == (
        PASS,
        "allgather for decode steps of 5 rows a rank, chosen anew for each pass "
        "(predicted ms a layer: alltoall 250, allgather 1)",
    )


def test_a_pass_that_is_replayed_is_gathered_whatever_it_takes():
    free, dear = Price(0.0, 0.0), Price(1.0, 0.0)
    prices = LinkPrices(GroupPrices(4, 0.0, exchange=free, gather=dear, reduce=dear))
    layer = _layer("auto", Auto(Links(Communicator(None)), prices, num_local_experts=2))
    assert choose_dispatcher(layer, 5, 2)[0] == "alltoall"
    assert choose_dispatcher(layer, 5, 2, has_static_shapes=True)[0] == "allgather"
    check = check_dispatcher(layer, 5, 2, "auto", has_static_shapes=True)
    assert "allgather for decode steps of 5 rows a rank, chosen once, as the" in check.reason


def test_batch_size_is_chosen_by_itself_unless_it_is_asked_for():
    files = ["--model", "m", "--input", "i", "--output", "o"]
    assert parse_options(files).batch_size is None
    assert parse_options([*files, "--batch-size", "3"]).batch_size == 3


@pytest.mark.parametrize(
    ("asked", "num_prompts", "free_gib", "size", "why"),
    [
        (5, 100, 1, 5, "as asked for"),
        (None, 100, 1000, 32, "most that is chosen"),
        (None, 5, 1000, 8, "no rank has more than 5"),
        (None, 100, 10, 8, "largest that fits"),  # 9 GiB for prompts of 1 GiB
        (None, 100, 0.5, 1, "largest that fits"),  # refused in phase 4
        (None, 1, 1000, 1, "no rank has more than 1"),
    ],
)
def test_batch_size(asked, num_prompts, free_gib, size, why):
    ranks = [_memory(free_bytes=1000 * _GIB), _memory(free_bytes=int(free_gib * _GIB))]
    found, reason = choose_batch_size(ranks, BatchNeeds(_GIB // 2, _GIB // 2), num_prompts, asked)
    assert found == size
    assert why in reason


# Phase 4


def _memory(rank=0, held=1000 * _MIB, grown=1000 * _MIB, free_bytes=10 * _GIB):
    return RankMemory(rank, f"host{rank}", 1000 * _MIB, held, grown, free_bytes)


def test_weights_are_as_predicted():
    assert judge_weights([_memory(), _memory(1)], is_exact=True).verdict == PASS
    more = judge_weights([_memory(), _memory(1, held=1100 * _MIB)], is_exact=True)
    assert more.verdict == WARN
    assert "[rank 1 host1] 1,000.00 MiB predicted, 1.07 GiB held" in more.reason
    kept = judge_weights([_memory(grown=2000 * _MIB)], is_exact=True)
    assert kept.verdict == WARN
    assert "loading has not given all back" in kept.reason
    assert judge_weights([_memory(grown=None)], is_exact=True).verdict == PASS


def test_weights_that_do_not_fit_are_refused_before_they_are_loaded():
    assert judge_room_for_weights({"rank 0 a": 5 * _GIB}, 5 * _GIB).verdict == PASS
    assert judge_room_for_weights({"rank 0 a": None}, 5 * _GIB).verdict == PASS
    check = judge_room_for_weights({"rank 0 a": 9 * _GIB, "rank 1 b": 4 * _GIB}, 5 * _GIB)
    assert check.verdict == FAIL
    assert "take 5.00 GiB, but [rank 1 b] has 4.00 GiB free. Use a higher ep_size" in check.reason


def test_memory_is_even_over_ranks():
    even = judge_spread([_memory(grown=1000 * _MIB), _memory(1, grown=1050 * _MIB)])
    assert (even.verdict, even.measured) == (PASS, 0.0)  # 50 MiB are a process's own affair
    odd = judge_spread([_memory(grown=1000 * _MIB), _memory(1, grown=1100 * _MIB)])
    assert odd.verdict == WARN
    assert odd.measured == pytest.approx(100 / 1050, abs=1e-4)
    assert "[rank 1 host1] has most" in odd.reason
    held = judge_spread([_memory(held=1000 * _MIB), _memory(1, held=1060 * _MIB)])
    assert held.measured == pytest.approx(60 / 1030, abs=1e-4)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    needs = BatchNeeds(kv_bytes=_GIB, pass_bytes=_GIB // 2)
    ranks = [_memory(free_bytes=100 * _GIB), _memory(1, free_bytes=10 * _GIB)]
    fits = judge_batch(ranks, needs, 6, 6)  # 9 GiB of room for 1.5 each
    assert fits.verdict == PASS
    assert "room for 6 prompts" in fits.reason
    check = judge_batch(ranks, needs, 64, 7)
    assert check.verdict == FAIL
    assert "--batch-size 64 does not fit: [rank 1 host1] has room for 9.00 GiB" in check.reason
    assert check.reason.endswith("Use --batch-size 6")
    none = judge_batch([_memory(free_bytes=_GIB)], needs, 1, 1)
    assert "Not one fits" in none.reason
    assert judge_batch([_memory(free_bytes=None)], needs, 64, 64).verdict == PASS


@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_the_cache_grows_as_predicted(family, tmp_path):
    save_tiny(family, tmp_path)
    spec = read_model_spec(tmp_path)
    model = build_tiny(family).eval()
    with torch.no_grad():
        cache = model(torch.arange(3, 10)[None], use_cache=True).past_key_values
    held = sum(each.nbytes for layer in cache.layers for each in (layer.keys, layer.values))
    assert held == 7 * kv_bytes_per_token(spec, 4)


def test_needs_by_hand():
    spec = read_model_spec(REPO / "configs" / "olmoe-1b-7b-ep64")
    # 16 layers of 16 heads of 128, keys and values, in 2 bytes.
    assert kv_bytes_per_token(spec, 2) == 16 * 16 * 128 * 2 * 2
    asked = {"ep_size": 64, "prompt_tokens": 100, "element_bytes": 2}
    needs = BatchNeeds.of(spec, new_tokens=28, on_gpu=False, **asked)
    assert needs.kv_bytes == 128 * kv_bytes_per_token(spec, 2)
    scored = BatchNeeds.of(spec, new_tokens=0, on_gpu=False, **asked)
    assert scored.kv_bytes == 0
    assert scored.pass_bytes - needs.pass_bytes == 99 * spec.vocab_size * (2 + 4)
    # A token's widest step, in OLMoE's width of 2048: four of it around the layer, one and a half
    # for each of the 8 ranks that its 8 experts live on, and 8 pairs of a row and an expert, each
    # of a row and 4 x 1024; more is held than that.
    numbers = 4 * 2048 + 1.5 * 8 * 2048 + 8 * (2048 + 4 * 1024)
    logits = spec.vocab_size * (2 + 4)
    assert needs.pass_bytes == pytest.approx(100 * 2 * 2.2 * numbers + logits, abs=1)
    on_gpu = BatchNeeds.of(spec, new_tokens=28, on_gpu=True, **asked)
    assert on_gpu.pass_bytes == pytest.approx(100 * 2 * 1.7 * numbers + logits, abs=1)
    # Gathered, the rows of all 64 ranks are held; on a GPU each is then a pair with the one expert.
    gathered = BatchNeeds.of(spec, new_tokens=28, on_gpu=False, dispatcher="allgather", **asked)
    more = 1.5 * (64 - 8) * 2048
    assert gathered.pass_bytes == pytest.approx(100 * 2 * 2.2 * (numbers + more) + logits, abs=1)
    on_gpu = BatchNeeds.of(spec, new_tokens=28, on_gpu=True, dispatcher="allgather", **asked)
    more += (64 - 8) * (2048 + 4 * 1024)
    assert on_gpu.pass_bytes == pytest.approx(100 * 2 * 1.7 * (numbers + more) + logits, abs=1)
    # With all experts on one rank, a row there is a pair with each of the 8 that it chose.
    alone = {**asked, "ep_size": 1, "new_tokens": 28}
    numbers = (4 + 1.5) * 2048 + 8 * (2048 + 4 * 1024)
    for on_gpu, held in ((False, 2.2), (True, 1.7)):
        needs_alone = BatchNeeds.of(spec, on_gpu=on_gpu, **alone)
        assert needs_alone.pass_bytes == pytest.approx(100 * 2 * held * numbers + logits, abs=1)
    # Two ranks of 32: 1 - (32! / (24! 8!)) / (64! / (56! 8!)) of the tokens want each of the two,
    # and on a GPU all 8 slots of such a row are computed.
    two = BatchNeeds.of(spec, on_gpu=True, **{**alone, "ep_size": 2})
    rows = 2 * (1 - 10_518_300 / 4_426_165_368)
    numbers = (4 + 1.5 * rows) * 2048 + rows * 8 * (2048 + 4 * 1024)
    assert two.pass_bytes == pytest.approx(100 * 2 * 1.7 * numbers + logits, abs=1)
    # An expert: three matrices of 2048 x 1024; one of each of 16 layers on a rank.
    experts = 16 * 3 * 2048 * 1024
    plan = ParallelPlan(64)
    assert weight_bytes(spec, plan, 2) == 2 * (spec.num_dense_params + experts)
    assert weight_bytes(spec, plan, 4) == 2 * weight_bytes(spec, plan, 2)
    assert largest_batch(-1, needs) == 0


# What the kernel says


def _machine(root, *, available_kib, files):
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable:   {available_kib} kB\n")
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)


_V2, _V1 = "sys/fs/cgroup/a/b", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 1000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n"}, 1000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{_V2}/memory.max": "max\n",
                f"{_V2}/memory.current": "5\n",
                "sys/fs/cgroup/a/memory.max": "90000\n",
                "sys/fs/cgroup/a/memory.current": "50000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 7\ninactive_file 1000\n",
            },
            41000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/outside\n",
                f"{_V1}/memory.limit_in_bytes": "70000\n",
                f"{_V1}/memory.usage_in_bytes": "80000\n",
            },
            0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/\n",
                f"{_V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{_V1}/memory.usage_in_bytes": "1\n",
            },
            1000 * 1024,
        ),
    ],
)
def test_the_limits_of_groups_count(tmp_path, files, expected):
    _machine(tmp_path, available_kib=1000, files=files)
    assert host_memory.available_bytes(tmp_path) == expected


def test_elsewhere_nothing_is_known(tmp_path):
    assert host_memory.available_bytes(tmp_path) is None


def test_this_process_holds_memory():
    held = host_memory.proportional_bytes()
    assert held is not None and math.log2(held) > 20
