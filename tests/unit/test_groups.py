"""What is refused before ranks touch their GPUs (the groups work: tests/dist)."""

import json
import sys

import pytest

from ds_moe_ep.dist import groups
from ds_moe_ep.dist.groups import _check_gpus, refuse_missing_gpus
from ds_moe_ep.dist.rank_info import RankInfo, read_rank_info
from ds_moe_ep.errors import ConfigError, PlanError
from tests.helpers.launch import REPO, run_command

_HOSTS = ["a", "a", "b", "b", "c", "c"]


def test_all_hosts_with_fewer_gpus_than_slots_are_named():
    with pytest.raises(PlanError) as refused:
        refuse_missing_gpus(_HOSTS, [0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 0, 0])
    assert str(refused.value).startswith("a: 1 GPUs for 2 slots; c: 0 GPUs for 2 slots. Write")


@pytest.mark.parametrize("num_gpus", [[2] * 6, [2, 2, 8, 8, 4, 4]])
def test_as_many_gpus_as_slots_or_more_are_enough(num_gpus):
    refuse_missing_gpus(_HOSTS, [0, 1, 0, 1, 0, 1], num_gpus)


def test_a_host_without_a_gpu_is_named_before_its_ranks_wait_for_others_on_cpus():
    told = [json.dumps([host, rank % 2, 2 * (host != "b")]) for rank, host in enumerate(_HOSTS)]
    with pytest.raises(PlanError, match=r"^b: 0 GPUs for 2 slots\. Write"):
        _check_gpus(told)
    _check_gpus([json.dumps([host, 0, 0]) for host in _HOSTS])  # a job on CPUs


def test_ranks_tell_each_other_of_their_gpus_when_they_meet(monkeypatch):
    met = {}

    def join(*ranks, **how):
        met.update(how)
        raise LookupError

    monkeypatch.setattr(groups, "join_process_group", join)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "set, so that it is put back")
    with pytest.raises(LookupError):
        groups.init_distributed(RankInfo(5, 1, 8, "b"), timeout_s=1)
    assert json.loads(met["told"]) == ["b", 1, 0]
    assert met["check"] is _check_gpus


_LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"LOCAL_RANK": None}, "RANK=1, LOCAL_RANK=None, WORLD_SIZE=2: a launcher sets all three"),
        ({"RANK": "first"}, "RANK=first, LOCAL_RANK=1, WORLD_SIZE=2: a launcher sets all three"),
        ({"MASTER_PORT": None}, "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT do not say"),
        ({"MASTER_ADDR": ""}, "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT do not say"),
    ],
)
def test_variables_of_half_a_launcher_are_refused(monkeypatch, changed, told):
    variables = _LAUNCHED | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"} | changed
    for name, value in variables.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as refused:
        read_rank_info()
    assert str(refused.value).startswith(told)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_one_of_several_processes_is_not_taken_for_the_only_rank(monkeypatch, name):
    for each in _LAUNCHED:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "1")
    assert read_rank_info().world_size == 1
    monkeypatch.setenv(name, "64")
    with pytest.raises(ConfigError, match=f"{name}=64, but RANK, .* --launcher pdsh launch"):
        read_rank_info()


def test_a_rank_of_half_a_launcher_ends_with_one_line(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    command = [sys.executable, REPO / "launch" / "infer.py", "--model", "M", "--input", "I"]
    ended = run_command([*command, "--output", "O"], env={"RANK": "1", "WORLD_SIZE": "2"})
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("ConfigError: RANK=1, LOCAL_RANK=None, WORLD_SIZE=2: a launcher sets")
