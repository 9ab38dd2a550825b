"""How the benchmark's sides are set up: what is announced, threads, warm calls, whose cores."""

import argparse
import os
from types import SimpleNamespace

import pytest
import torch

from ds_moe_ep.bench import command, hardware_now, load, overlap
from ds_moe_ep.bench.generate_sides import one_process
from ds_moe_ep.bench.hardware_now import HardwareNow
from ds_moe_ep.bench.models import SHAPES
from ds_moe_ep.bench.timing import Spread
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.dist.rank_info import RankInfo


def job_of(world_size, nodes=(), rank=0):
    info = RankInfo(rank=rank, local_rank=0, world_size=world_size, host="h")
    return Job(info, torch.device("cpu"), control=None, nodes=nodes)


@pytest.fixture
def two_cores_of_many(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_one_process_computes_with_the_cores_it_may_use(two_cores_of_many, monkeypatch):
    module, threads = "ds_moe_ep.bench.generate_sides", []
    model = torch.nn.Identity()
    monkeypatch.setattr(
        f"{module}.AutoModelForCausalLM",
        SimpleNamespace(from_pretrained=lambda *args, **kwargs: model),
    )
    monkeypatch.setattr(f"{module}.complete", lambda *args: threads.append(torch.get_num_threads()))
    torch.set_num_threads(1)
    one_process("model", job_of(1), "eager")(torch.ones(1, 1), 1)
    assert threads == [2]
    assert torch.get_num_threads() == 1


def test_both_ways_to_load_have_loaded_once_before_they_are_timed(two_cores_of_many, monkeypatch):
    loaded = []

    def from_pretrained(*args, **kwargs):
        loaded.append(torch.get_num_threads())

    def time_in_turn(sides, rounds, **kwargs):
        assert loaded == [2]
        return {name: Spread(1.0, 1.0, 1.0, rounds) for name in sides}

    model = SimpleNamespace(from_pretrained=from_pretrained)
    monkeypatch.setattr(load, "AutoModelForCausalLM", model)
    monkeypatch.setattr(load, "time_in_turn", time_in_turn)
    args = argparse.Namespace(rounds=3, timeout=1.0)
    assert load._time(args, job_of(2), "model")["transformers"]["num_rounds"] == 3
    load._time(args, job_of(2, rank=1), "model")  # for rank 0 alone
    assert loaded == [2]


@pytest.mark.parametrize(
    ("nodes", "hosts_are_simulated", "is_shared"),
    [
        ((0, 0), False, False),
        ((0, 0, 0), False, True),
        ((0, 0, 1, 1), False, False),  # two cores on each of two hosts
        ((0, 0, 1, 1), True, True),
    ],
)
def test_ranks_share_the_cores_of_their_own_machine(
    two_cores_of_many, monkeypatch, nodes, hosts_are_simulated, is_shared
):
    monkeypatch.setattr(hardware_now, "_alone", lambda *args: None)
    hardware = HardwareNow(
        job_of(len(nodes), nodes), 1.0, SHAPES["tiny"], hosts_are_simulated=hosts_are_simulated
    )
    assert hardware._is_shared() == is_shared


@pytest.mark.parametrize("when", ["after the experts", "while rows travel"])
def test_overlap_measures_the_layer_as_infer_runs_it(monkeypatch, when):
    """Laid out for a CPU, and told the tokens of all ranks before each call."""
    seen = []
    experts = SimpleNamespace(shared_expert="early")
    layer = SimpleNamespace(deepspeed_moe=experts, announce=lambda tokens: seen.append(tokens))
    monkeypatch.setattr(overlap, "adapt", lambda *args, **kwargs: seen.append("adapted"))
    monkeypatch.setattr(overlap, "bind_expert_groups", lambda *args, **kwargs: None)
    monkeypatch.setattr(overlap, "prepare_for_inference", lambda model: seen.append("prepared"))
    monkeypatch.setattr(overlap, "moe_layers", lambda model: [layer])
    model = overlap._build_one_layer()
    side = overlap._side(model, job_of(3, (0, 0, 0)), "auto", "shared memory", when)
    x_TH = torch.randn(4, model.config.hidden_size)
    with torch.no_grad():
        assert side(x_TH).shape == x_TH.shape
    assert seen == ["adapted", "prepared", [4, 4, 4]]
    assert experts.shared_expert == (None if when == "after the experts" else "early")


def test_overlap_is_not_asked_for_a_dispatcher_of_replicated_tokens(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main("bench.py", ["overlap", "--dispatcher", "allreduce"], None)
    assert ended.value.code == 2
    assert "invalid choice: 'allreduce'" in capsys.readouterr().err
