"""The cost model's arithmetic: fits to known lines, and predictions counted by hand."""

import pytest
import torch

from ds_moe_ep.adapter import adapt, moe_layers
from ds_moe_ep.bench.layer_sides import build_one_layer
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.dist.collectives import Communicator
from ds_moe_ep.moe import probe
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.cost_model import (
    ExpertPrices,
    GroupPrices,
    LayerShape,
    LinkPrices,
    Price,
    fit_prices,
    predict_s,
)
from ds_moe_ep.moe.dispatch import Links
from ds_moe_ep.moe.experts import NOT_HERE
from ds_moe_ep.plan import ParallelPlan

# 4 experts, one chosen, on as many ranks: a token wants each rank with a chance of 1/4.
TOP_1_OF_4 = LayerShape(num_experts=4, top_k=1, row_bytes=92)  # 100 with its routing
BYTES_ONLY = Price(latency_s=0.0, s_per_byte=1.0)
LATENCY_ONLY = Price(latency_s=1.0, s_per_byte=0.0)


def prices(size: int, price: Price, counts_s: float = 0.0) -> GroupPrices:
    return GroupPrices(size, counts_s, exchange=price, gather=price, reduce=price)


def test_a_line_goes_through_the_quickest_of_each_size():
    samples = [(100, 1.1), (100, 1.0), (100, 9.0), (1100, 2.1), (1100, 2.0), (1100, 5.0)]
    price = fit_prices({"gather": samples})["gather"]
    assert price.s_per_byte == pytest.approx(1.0 / 1000)
    assert price.seconds(100) == pytest.approx(1.0)
    assert price.seconds(1100) == pytest.approx(2.0)


def test_all_kinds_share_the_median_price_of_bytes():
    found = fit_prices(
        {
            "exchange": [(0, 1.0), (100, 2.0)],
            "gather": [(0, 3.0), (100, 3.0)],  # noise hides what its bytes cost
            "reduce": [(0, 2.0), (100, 4.0)],
        }
    )
    assert found == {
        "exchange": Price(1.0, 0.01),
        "gather": Price(3.0, 0.01),
        "reduce": Price(2.0, 0.01),
    }


@pytest.mark.parametrize(
    ("samples", "expected"),
    [
        ([(100, 2.0), (200, 1.0)], Price(2.0, 0.0)),  # noise: large was faster
        ([(100, 0.1), (200, 1.1)], Price(0.0, 0.01)),  # noise: the line starts below zero
        ([(0, 0.5), (0, 0.7)], Price(0.5, 0.0)),  # a group of one sends nothing
    ],
)
def test_no_price_is_negative(samples, expected):
    assert fit_prices({"gather": samples})["gather"] == Price(
        pytest.approx(expected.latency_s), pytest.approx(expected.s_per_byte)
    )


@pytest.mark.parametrize(
    ("shape", "num_local_experts", "share"),
    [
        (LayerShape(4, 1, 0), 1, 1 / 4),
        (LayerShape(4, 2, 0), 1, 1 / 2),
        (LayerShape(4, 2, 0), 2, 5 / 6),  # but one of the six pairs lies wholly elsewhere
        (LayerShape(64, 8, 0), 64, 1.0),
    ],
)
def test_the_share_of_tokens_that_want_a_rank(shape, num_local_experts, share):
    assert shape.share_wanted(num_local_experts) == pytest.approx(share)


def test_bytes_are_those_of_the_busiest_rank():
    links = LinkPrices(prices(4, BYTES_ONLY))
    predicted = predict_s(links, TOP_1_OF_4, (10, 0, 0, 0))
    # Rank 0 sends its ten rows to three ranks, with their routing there, without it back. To the
    # one rank that owns a token's one expert a row goes without.
    assert predicted == {
        "allgather": pytest.approx(3 * 10 * (100 + 92)),
        "alltoall": pytest.approx(3 * 10 * (92 + 92) / 4),
    }
    # Each receives the ten of the three others.
    assert predict_s(links, TOP_1_OF_4, (10, 10, 10, 10))["allgather"] == pytest.approx(30 * 192)
    assert predict_s(links, TOP_1_OF_4, (0, 10, 10, 10))["allgather"] == pytest.approx(30 * 192)


def test_alltoall_pays_for_counts():
    links = LinkPrices(prices(4, LATENCY_ONLY, counts_s=0.5))
    assert predict_s(links, TOP_1_OF_4, (1, 1, 1, 1)) == {"alltoall": 2.5, "allgather": 2.0}


def test_alltoall_pays_for_sorting_rows_and_summing_them():
    links = LinkPrices(prices(4, Price(0.0, 0.0)), local_s_per_byte=1.0)
    # Rank 1 has most rows; a quarter of each goes to every rank, itself among them.
    predicted = predict_s(links, TOP_1_OF_4, (4, 12, 0, 8))
    assert predicted == {"alltoall": pytest.approx(12 * 92), "allgather": 0.0}
    nothing = prices(2, Price(0.0, 0.0))
    two_levels = LinkPrices(links.flat, across=nothing, within=nothing, local_s_per_byte=1.0)
    # Half of rank 1's 12 rows go to each node. Place 0 of a node then has half of 4 + 0 rows and
    # place 1 half of 12 + 8, of which half go to each rank.
    predicted = predict_s(two_levels, TOP_1_OF_4, (4, 12, 0, 8))
    assert predicted["alltoall-2level"] == pytest.approx(12 * 92 + 10 * 92)
    assert predicted["allgather-2level"] == 0.0


def test_two_levels_add_up():
    links = LinkPrices(
        prices(4, LATENCY_ONLY), across=prices(2, BYTES_ONLY, 7.0), within=prices(2, LATENCY_ONLY)
    )
    predicted = predict_s(links, TOP_1_OF_4, (5, 1, 3, 2))  # places 0: 5 and 3, places 1: 1 and 2
    assert predicted["allgather-2level"] == pytest.approx(5 * 192 + 2)
    assert predicted["alltoall-2level"] == pytest.approx(7 + 5 * 192 / 2 + 2)
    by_bytes = LinkPrices(
        prices(4, LATENCY_ONLY), across=prices(2, LATENCY_ONLY), within=prices(2, BYTES_ONLY)
    )
    predicted = predict_s(by_bytes, TOP_1_OF_4, (5, 1, 3, 2))
    # Place 0 of each node has gathered eight rows, of which a half wanted the node.
    assert predicted["allgather-2level"] == pytest.approx(2 + 8 * 192)
    # Within it they go bare, as each rank has one expert.
    assert predicted["alltoall-2level"] == pytest.approx(2 + 8 / 2 * 184 / 2)


def test_gathered_rows_are_looked_through_for_the_experts_of_a_rank():
    free = Price(0.0, 0.0)
    experts = ExpertPrices(s_per_pair=100.0, s_per_slot=1.0)
    links = LinkPrices(prices(4, free), experts=experts)
    # One expert on each of four ranks: of ten tokens 10/4 choose it, and with allgather all ten are
    # looked at. Bare rows are not.
    assert predict_s(links, TOP_1_OF_4, (4, 4, 1, 1)) == {"alltoall": 250.0, "allgather": 260.0}
    two_levels = LinkPrices(links.flat, prices(2, free), prices(2, free), experts=experts)
    predicted = predict_s(two_levels, TOP_1_OF_4, (4, 4, 1, 1))
    assert predicted["alltoall-2level"] == 250.0
    assert predicted["allgather-2level"] == 260.0
    # Two of eight experts each, two chosen: 10 * 2/4 pairs. A row has two slots; with alltoall rows
    # come that chose one or both: all but 15 of 28 ways to choose.
    predicted = predict_s(links, LayerShape(8, 2, 92), (4, 4, 1, 1))
    assert predicted == {
        "alltoall": pytest.approx(500 + 20 * 13 / 28),
        "allgather": pytest.approx(500 + 20),
    }


def test_the_probe_runs_the_experts_of_a_layer_for_rows_of_theirs_and_for_others():
    model = build_one_layer(SHAPES["105M"])
    adapt(model, ParallelPlan(4), ep_rank=1)
    (layer,) = moe_layers(model)
    computed = []

    def clock(run):
        _, rows_e = run()
        computed.append(rows_e.tolist())
        return 1.5

    x_TH, here_T1 = torch.zeros(40, layer.hidden_size), torch.arange(40)[:, None] % 16
    works = [
        probe._experts(layer, "pairs", x_TH, here_T1, clock),
        probe._experts(layer, "slots", x_TH, torch.full_like(here_T1, NOT_HERE), clock),
    ]
    assert [(work.kind, work.amount, work.seconds()) for work in works] == [
        ("pairs", 40, 1.5),
        ("slots", 40, 1.5),
    ]
    assert computed == [[3] * 8 + [2] * 8, [0] * 16]


def test_on_a_cpu_experts_have_no_price():
    model = build_one_layer(SHAPES["105M"])
    adapt(model, ParallelPlan(1), ep_rank=0)
    (layer,) = moe_layers(model)
    links = Links(Communicator(None))
    assert probe.measure_links(links, torch.device("cpu"), layer).experts is None


def test_slots_make_auto_send_routed_rows():
    nothing = Price(0.0, 0.0)
    group = GroupPrices(4, 1e-3, exchange=nothing, gather=nothing, reduce=nothing)
    links = Links(Communicator(None))
    chosen = [
        Auto(links, LinkPrices(group, experts=experts), 2).choose(2, 64, [50] * 4)[0]
        for experts in (None, ExpertPrices(1e-6, 1e-6), ExpertPrices(1e-6, 1e-5))
    ]
    # Counts take a millisecond. Of 400 slots routed rows spare 15 / 28, 214.
    assert chosen == ["allgather", "allgather", "alltoall"]


@pytest.mark.parametrize(
    ("run_s", "num_rounds"),
    [(0.001, 5), (0.06, 3), (0.1, 2), (4.0, 2)],  # three runs a round, until half a second
)
def test_the_probe_stops_after_half_a_second_but_not_before_two_rounds(run_s, num_rounds):
    (seconds,) = probe._time([lambda: run_s], Communicator(None), torch.device("cpu"))
    assert seconds == [pytest.approx(run_s)] * 3 * num_rounds


def test_a_pass_of_static_shapes_is_gathered_however_cheap_it_is_to_send():
    free = Price(latency_s=0.0, s_per_byte=0.0)
    dear = Price(latency_s=1.0, s_per_byte=1.0)
    auto = Auto(Links(Communicator(None)), LinkPrices(GroupPrices(1, 0.0, free, dear, dear)), 4)
    rows = torch.zeros(2, 8), torch.zeros((2, 1), dtype=torch.int64), torch.ones(2, 1)
    for auto.has_static_shapes in (False, True, True):
        auto(lambda x, ids, weights: (x, torch.zeros(4)), *rows, [2])
    assert auto.calls == {"alltoall": 1, "allgather": 2}
