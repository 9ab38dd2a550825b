"""Predicted passes, against tables counted by hand, published figures and what must always hold."""

import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.hostfile import Cluster, Host, local_cluster
from ds_moe_ep.memory_needs import weight_bytes
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.moe.cost_model import GroupPrices, LinkPrices, Price
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.alternatives import compare_with_replicas
from ds_moe_ep.predict.hardware import DEVICES, LINKS, Device, Launches, price_links
from ds_moe_ep.predict.passes import (
    Deployment,
    Pass,
    bytes_sent_per_token,
    expected_experts,
    expected_most_rows,
    predict_pass,
)
from ds_moe_ep.predict.throughput import (
    Memory,
    Sequences,
    SequenceTimes,
    as_replicas,
    best_batch,
    fitting_batch,
    whole_batches,
)
from tests.helpers.launch import REPO

OLMOE = read_model_spec(REPO / "configs" / "olmoe-1b-7b-ep64")
DEEPSEEK_V3 = read_model_spec(REPO / "configs" / "deepseek-v3-ep64")
ON_8X8 = Cluster(tuple(Host(f"worker-{i}", tuple(range(8))) for i in range(8)), "test")
EP64 = ParallelPlan(64)
H200 = DEVICES["h200"]
FREE = Price(0.0, 0.0)
SLOW = Price(40e-6, 1 / 45e9)
FLAT_LINKS = LinkPrices(GroupPrices(64, 40e-6, exchange=SLOW, gather=SLOW, reduce=SLOW))
FREE_LINKS = LinkPrices(GroupPrices(64, 0.0, exchange=FREE, gather=FREE, reduce=FREE))


def links(device=H200, between="ib-400g"):
    return price_links(ON_8X8, range(64), device, within=LINKS["nvlink4"], between=LINKS[between])


def olmoe(plan=EP64, device=H200, with_links=None):
    return Deployment(OLMOE, plan, device, with_links or links())


def device(**kwargs):
    """One that does one operation, or reads one byte, a second, and is told for nothing."""
    defaults = {
        "name": "slow",
        "flops_16bit": 1.0,
        "flops_32bit": 1.0,
        "bytes_per_s": 1.0,
        "launches": Launches(),
        "memory_bytes": None,
        "reserved_bytes": 0,
        "overlaps": True,
        "source": "",
    }
    return Device(**{**defaults, **kwargs})


def parts(times):
    return {part.name: part for part in times.parts}


# What is read and multiplied


def test_reading_the_weights_of_olmoe_at_ep64_takes_the_published_time():
    # 0.95 GB of dense weights, of which the embedding's 0.2 GB are not read, and 0.2 GB of experts.
    assert weight_bytes(OLMOE, EP64, 2) == pytest.approx(1.15e9, rel=0.01)
    assert weight_bytes(OLMOE, EP64, 2) / 4.3e12 == pytest.approx(0.27e-3, rel=0.02)
    read = parts(predict_pass(olmoe(), Pass(8)))  # 512 tokens in all choose every expert
    assert read["dense weights"].num_bytes == pytest.approx(0.95e9 - 50304 * 2048 * 2, rel=0.02)
    assert read["experts"].num_bytes == pytest.approx(0.2e9, rel=0.3)  # and its rows
    assert read["experts"].seconds == pytest.approx(0.2e9 / 4.3e12, rel=0.3)


def test_the_parts_of_a_decode_step_counted_by_hand():
    # OLMoE in bfloat16 on one GPU: 3 prompts, one token each after 10.
    times = predict_pass(olmoe(ParallelPlan(1), device(), None), Pass(3, context=10))
    layer = 4 * 2048 * 2048 + 64 * 2048 + 4 * 2048  # projections, router, norms of layer, q and k
    head = 50304 * 2048
    dense = 16 * layer + 2048 + head
    found = parts(times)
    assert found["dense weights"].num_bytes == 2 * (dense + 3 * 16 * 20 * 2048)
    assert found["dense weights"].flops == 2 * 3 * dense
    # Keys and values of 16 layers: 10 read, 11 written, 11 read again, for 3 prompts.
    assert found["attention"].num_bytes == 3 * (10 + 11 + 11) * 16 * 2 * 2048 * 2
    assert found["attention"].flops == 3 * 16 * 2 * 2 * 2048 * 11
    expert = 3 * 2048 * 1024
    chosen = 64 * (1 - (56 / 64) ** 3)
    moved = 3 * 8 * (5 * 2048 + 6 * 1024)
    assert found["experts"].num_bytes == pytest.approx(16 * 2 * (chosen * expert + moved))
    assert found["experts"].flops == 16 * 2 * 24 * expert
    assert "communication" not in found
    # Weights and the cache are read while products are formed, rows are moved before and after.
    assert found["dense weights"].seconds == max(2 * dense, 2 * 3 * dense) + 2 * 3 * 16 * 20 * 2048
    cache = 3 * 16 * 2 * 2048 * 2
    attention_s = max(11 * cache, found["attention"].flops) + (10 + 11) * cache
    assert found["attention"].seconds == attention_s
    assert times.seconds == pytest.approx(sum(part.seconds for part in times.parts))
    in_place = parts(
        predict_pass(olmoe(ParallelPlan(1), device(), None), Pass(3, context=10, in_place=True))
    )
    assert in_place["attention"].num_bytes == (11 + 1) * cache


def test_every_operation_takes_a_gpu_a_kernel_however_little_it_reads():
    model = olmoe(ParallelPlan(1), device(kernel_s=1e15), None)
    times = predict_pass(model, Pass(1))
    assert parts(times)["kernels"].seconds == (16 * 77 + 18) * 1e15  # as docs/planning.md counts
    assert times.bound == "starting kernels"
    assert times.device_s == sum(part.seconds for part in times.parts)


def test_a_prefill_multiplies_each_token_and_the_head_once():
    found = parts(predict_pass(olmoe(ParallelPlan(1), device(), None), Pass(2, 100)))
    layers = 16 * (4 * 2048 * 2048 + 64 * 2048 + 4 * 2048) + 2048
    assert found["dense weights"].flops == 2 * (200 * layers + 2 * 50304 * 2048)
    scored = parts(
        predict_pass(olmoe(ParallelPlan(1), device(), None), Pass(2, 100, is_scored=True))
    )
    assert scored["dense weights"].flops == 2 * 200 * (layers + 50304 * 2048)
    # Each token attends to itself and those before it: 50.5 on average.
    assert found["attention"].flops == pytest.approx(200 * 50.5 * 16 * 2 * 2 * 2048)


def test_latent_attention_has_values_narrower_than_keys():
    model = Deployment(DEEPSEEK_V3, ParallelPlan(1), device())
    found = parts(predict_pass(model, Pass(1, context=9)))
    assert found["attention"].flops == 61 * 128 * 2 * (192 + 128) * 10
    assert found["attention"].num_bytes == (9 + 10 + 10) * 61 * (512 + 64) * 2


def test_a_device_that_does_one_thing_at_a_time_adds_up():
    one_by_one = device(overlaps=False, launches=Launches(layer_s=10.0, step_s=3.0, start_s=5.0))
    times = predict_pass(Deployment(OLMOE, ParallelPlan(1), one_by_one), Pass(1, is_first=True))
    assert times.launching.seconds == 16 * 10 + 3 + 5
    work = sum(part.num_bytes + part.flops for part in times.parts)
    assert times.seconds == pytest.approx(work + 168)
    assert sum(times.shares().values()) == pytest.approx(1.0)


def test_ranks_that_share_cores_wait_before_and_after_the_experts():
    plain = device(overlaps=False)
    sharing = replace(plain, wait_s=1.0)
    for prompts in (1, 4096):  # allgather, and alltoall, whose rows follow their counts at once
        one, other = (
            predict_pass(olmoe(device=each, with_links=FLAT_LINKS), Pass(prompts))
            for each in (plain, sharing)
        )
        assert other.seconds - one.seconds == pytest.approx(16 * 2, rel=1e-6)
        assert parts(other)["communication"].bound == "network latency"
    alone = [Deployment(OLMOE, ParallelPlan(1), each) for each in (plain, sharing)]
    assert len({predict_pass(each, Pass(4)).seconds for each in alone}) == 1


def test_a_gpu_works_while_it_is_told():
    slow_host = device(launches=Launches(layer_s=1e12))
    times = predict_pass(Deployment(OLMOE, ParallelPlan(1), slow_host), Pass(1))
    assert times.seconds == 16e12
    assert times.bound == "launching operations"
    assert sum(times.shares().values()) == pytest.approx(1.0)


# Routing


def test_expected_experts_are_those_of_all_choices_counted():
    # 4 experts, 2 chosen, 2 tokens: all 36 pairs of choices.
    choices = [set(pair) for pair in combinations(range(4), 2)]
    counted = sum(len(a | b) for a in choices for b in choices) / len(choices) ** 2
    assert expected_experts(4, 2, 2) == pytest.approx(counted)
    assert expected_experts(64, 8, 0) == 0


@given(st.integers(1, 64), st.integers(0, 5000))
def test_experts_chosen_grow_with_tokens_and_never_exceed_all(top_k, num_tokens):
    found = expected_experts(64, top_k, num_tokens)
    assert found <= expected_experts(64, top_k, num_tokens + 1) <= 64
    assert found >= min(1, num_tokens) * top_k * (1 - 1e-9)


def test_the_busiest_rank_of_random_routing():
    import random

    chance = random.Random(0)
    most = []
    for _ in range(60):
        rows = [0] * 64
        for _ in range(512):
            for expert in chance.sample(range(64), 8):
                rows[expert] += 1
        most.append(max(rows))
    assert expected_most_rows(64, 8, 512, 1) == pytest.approx(sum(most) / len(most), rel=0.05)


def test_the_busiest_rank_has_at_least_the_mean_and_at_most_all():
    assert expected_most_rows(64, 8, 512, 64) == 512 * 8  # one rank has all
    assert expected_most_rows(64, 64, 10, 1) == 10  # every expert is chosen by every token
    assert expected_most_rows(64, 8, 1, 1) <= 1


# Messages


def test_bytes_a_token_sends_counted_by_hand():
    row, with_routing = 2048 * 2, 2048 * 2 + 8 * 8
    found = bytes_sent_per_token(OLMOE, EP64)
    # One expert a rank: a token wants 8 of 64 ranks, so 63/64 of 8 others on average.
    assert found["alltoall"] == pytest.approx(16 * 63 / 8 * (row + with_routing))
    assert found["allgather"] == 16 * 63 * (row + with_routing)
    assert set(bytes_sent_per_token(OLMOE, ParallelPlan(1, dp_size=64)).values()) == {0.0}


def test_links_of_a_host_and_of_several():
    within, between = LINKS["nvlink4"], LINKS["ib-400g"]
    one_host = price_links(local_cluster(8), range(8), H200, within=within, between=between)
    assert one_host.across is None
    assert one_host.flat.exchange == Price(10e-6, 1 / 225e9)
    several = links()
    assert (several.across.size, several.within.size, several.flat.size) == (8, 8, 64)
    # 56 of 63 other ranks are on other hosts.
    assert several.flat.gather.s_per_byte == pytest.approx(56 / 63 / 45e9)
    assert several.within.gather == Price(10e-6, 1 / 225e9)
    uneven = Cluster((Host("a", (0, 1)), Host("b", (0,))), "test")
    found = price_links(uneven, range(3), H200, within=within, between=between)
    assert found.across is None
    assert found.flat.gather.s_per_byte == pytest.approx(2 / 2 / 45e9)


def test_deepep_on_64_ranks_is_predicted_within_a_quarter():
    # Published for 128 tokens a rank of DeepSeek-V3 in bfloat16 on such links: combine 314 us.
    # There 8 rows of a token travel, not one to each rank: 7.5 different ranks and 4 bytes less.
    price = links().flat.exchange
    assert price.seconds(128 * 8 * 7168 * 2) == pytest.approx(314e-6, rel=0.25)


def test_the_dispatcher_is_the_cheapest_of_the_cost_model():
    assert predict_pass(olmoe(), Pass(1)).dispatcher.startswith("allgather")
    assert predict_pass(olmoe(), Pass(512)).dispatcher.startswith("alltoall")


# What must always hold


@given(st.sampled_from([1, 2, 4, 8, 16, 32]), st.sampled_from([OLMOE, DEEPSEEK_V3]))
def test_more_gpus_never_hold_more_weights_each(ep_size, spec):
    assert weight_bytes(spec, ParallelPlan(2 * ep_size), 2) <= weight_bytes(
        spec, ParallelPlan(ep_size), 2
    )


@given(st.integers(1, 300), st.integers(0, 4000), st.sampled_from(["h200", "h100", "a100-80g"]))
def test_more_prompts_and_longer_ones_never_take_less(prompts, context, name):
    model = olmoe(device=DEVICES[name])
    seconds = predict_pass(model, Pass(prompts, context=context)).device_s
    assert seconds <= predict_pass(model, Pass(prompts + 1, context=context)).device_s * (1 + 1e-9)
    assert seconds <= predict_pass(model, Pass(prompts, context=context + 1)).device_s
    assert seconds > 0


@given(st.integers(1, 200))
def test_slower_links_never_make_a_pass_quicker(prompts):
    fast, slow = (
        predict_pass(olmoe(with_links=links(between=name)), Pass(prompts)).seconds
        for name in ("ib-400g", "ib-100g")
    )
    free = predict_pass(olmoe(with_links=FREE_LINKS), Pass(prompts)).seconds
    assert free <= fast <= slow


# Memory and throughput


def test_the_largest_batch_fills_the_room_and_not_more():
    sequences = Sequences(1920, 128)
    memory = Memory.of(OLMOE, EP64, sequences, H200)
    assert memory.kv_bytes_per_token == 16 * 2 * 2048 * 2
    assert memory.needs.kv_bytes == 2048 * memory.kv_bytes_per_token
    assert memory.room_bytes == int((141e9 - 2e9 - memory.weight_bytes) * 0.9)
    batch = memory.largest_batch
    assert batch * memory.needs.num_bytes <= memory.room_bytes
    assert (batch + 1) * memory.needs.num_bytes > memory.room_bytes
    assert Memory.of(OLMOE, EP64, sequences, None).largest_batch is None
    tried = [times.batch for times in whole_batches(olmoe(), sequences)]
    assert tried == [1, 2, 4, 8, 16, 32, 64, 128, batch]


def test_a_model_that_does_not_fit_has_no_batches():
    copies = as_replicas(Deployment(DEEPSEEK_V3, EP64, H200, links()))
    assert copies.plan == ParallelPlan(1, dp_size=64)
    assert fitting_batch(copies, Sequences(100, 10)) == 0
    assert list(whole_batches(copies, Sequences(100, 10))) == []
    assert best_batch(copies, Sequences(100, 10)) is None


def test_sequences_a_second_are_those_of_all_ranks():
    times = SequenceTimes(olmoe(), Sequences(100, 11), batch=4)
    step = predict_pass(olmoe(), Pass(4, context=105)).seconds
    first = predict_pass(olmoe(), Pass(4, 100, is_first=True)).seconds
    assert times.seconds == pytest.approx(first + 10 * step)  # the first pass makes a token too
    assert times.sequences_per_s == pytest.approx(4 * 64 / times.seconds)
    assert times.tokens_per_s == pytest.approx(4 * 64 / step)
    scored = SequenceTimes(olmoe(), Sequences(100, 0), batch=4)
    read = predict_pass(olmoe(), Pass(4, 100, is_first=True, is_scored=True)).seconds
    assert scored.seconds == read
    assert scored.tokens_per_s == pytest.approx(400 * 64 / read)


def test_copies_beat_expert_parallelism_where_the_model_fits_and_not_where_it_does_not():
    sequences = Sequences(1920, 128)
    small = compare_with_replicas(olmoe(), sequences)
    assert small.fits
    assert small.weight_bytes == OLMOE.num_params * 2
    assert small.replicas.sequences_per_s > small.spread.sequences_per_s
    assert small.wins_from_params > OLMOE.num_params
    for batch in (32, 128):
        spread, alone = (
            SequenceTimes(each, sequences, batch).step.seconds
            for each in (olmoe(), as_replicas(olmoe()))
        )
        assert (batch in small.quicker_batches) is (spread < alone)
    large = compare_with_replicas(Deployment(DEEPSEEK_V3, EP64, H200, links()), sequences)
    assert large.fits is False
    assert large.replicas is None
    assert large.spread.batch >= 1
    assert large.wins_from_params == DEEPSEEK_V3.num_params


def test_expert_parallelism_wins_at_once_where_messages_are_free():
    # Its GPU reads one expert of a layer where a copy's reads as many as its prompts choose.
    told_for_nothing = device(
        flops_16bit=H200.flops_16bit, bytes_per_s=H200.bytes_per_s, memory_bytes=141 * 10**9
    )
    model = olmoe(device=told_for_nothing, with_links=FREE_LINKS)
    assert compare_with_replicas(model, Sequences(64, 64)).quicker_batches[:4] == (1, 2, 4, 8)


def test_the_published_figures_are_positive_and_say_where_they_come_from():
    for found in DEVICES.values():
        assert found.source
        assert min(found.flops_16bit, found.flops_32bit, found.bytes_per_s) > 0
        assert math.isfinite(found.launches.layer_s)
    assert all(link.source and link.bytes_per_s > 0 < link.latency_s for link in LINKS.values())
    assert H200.flops(2) == pytest.approx(791e12, rel=0.01)
    assert H200.bytes_per_s == pytest.approx(4.3e12, rel=0.01)
