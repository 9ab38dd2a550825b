"""`ds-moe-ep balance`: what it reads of a recorded run, tells, writes and refuses."""

import json
import os
import subprocess
import sys

import pytest

from ds_moe_ep.cli import main
from ds_moe_ep.config.placement_file import read_placement
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.recorded import read_expert_loads, read_recorded_cluster
from tests.helpers.launch import REPO


@pytest.fixture
def recorded(tmp_path):
    """Four ranks on two hosts; of eight experts the first has half the load."""
    loads = {1: [70, 10, 10, 10, 10, 10, 10, 10], 2: [10, 10, 10, 10, 10, 10, 10, 70]}
    lines = [json.dumps({"layer": n, "tokens_per_expert": x}) for n, x in loads.items()]
    (tmp_path / "experts.jsonl").write_text("\n".join(lines) + "\n")
    ranks = [{"rank": rank, "host": f"worker-{rank // 2}", "run_s": 1.5} for rank in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, ranks)) + "\n")
    return tmp_path


def test_what_was_recorded_is_read(recorded):
    assert read_expert_loads(recorded)[2] == (10, 10, 10, 10, 10, 10, 10, 70)
    hosts = read_recorded_cluster(recorded).hosts
    assert [(host.name, host.slots) for host in hosts] == [
        ("worker-0", (0, 1)),
        ("worker-1", (0, 1)),
    ]


def test_hosts_that_take_turns_are_one(recorded, capsys):
    path = recorded / "metrics.jsonl"
    ranks = [{"rank": rank, "host": f"worker-{rank % 2}"} for rank in range(4)]
    path.write_text("\n".join(map(json.dumps, ranks)) + "\n")
    cluster = read_recorded_cluster(recorded)
    assert [host.slots for host in cluster.hosts] == [(0, 1, 2, 3)]
    assert cluster.source == str(path)
    code, told, _ = _said(capsys, recorded)
    assert code == 0
    assert f"ranks  4 ({path}), 2 experts of a layer on each" in told


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"layer": 2, "tokens_per_expert": [1]}', "layer 2 is there twice"),
        ('{"layer": 3, "tokens_per_expert": [1]}', "layer 3 has 1 experts, the layers before it 8"),
        ('{"layer": 3, "tokens_per_expert": [-1]}', "tokens_per_expert.0=-1"),
        ('{"layer": 3, "tokens": [1]}', "tokens_per_expert is missing; unknown key 'tokens'"),
        ("[1]", "a JSON object ({...}) is needed"),
        ('{"layer": 3', "not valid JSON"),
    ],
)
def test_loads_that_cannot_be_read(recorded, line, says):
    path = recorded / "experts.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError) as refused:
        read_expert_loads(recorded)
    assert str(refused.value).startswith(f"{path}:3")
    assert says in str(refused.value)


def test_a_folder_without_records(tmp_path):
    with pytest.raises(ConfigError, match=r"has no experts.jsonl.*--metrics DIR"):
        read_expert_loads(tmp_path)
    with pytest.raises(ConfigError, match=r"has no metrics.jsonl.*--num-ranks N"):
        read_recorded_cluster(tmp_path)


def _said(capsys, *args):
    code = main(["balance", *map(str, args)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_tells_and_writes(recorded, capsys):
    out = recorded / "placement.json"
    code, told, _ = _said(capsys, recorded, "--slots-per-rank", 3, "--out", out)
    assert code == 0
    # Contiguous: 80, 20, 20, 20 and 20, 20, 20, 80 of 140, so 35 / 80, and 70 / 100 together.
    assert (
        "contiguous  balancedness 0.700 overall, 0.438 layer by layer (least: 0.438 in layer 1)"
        in told
    )
    assert "4 on 2 hosts" in told
    assert "1 expert of a layer more on each rank: 50% more expert weights" in told
    placement = read_placement(out)
    assert (placement.num_ranks, placement.slots_per_rank) == (4, 3)
    assert len(placement.owners(1, 0)) > 1 < len(placement.owners(2, 7))
    assert f"infer.py --placement {out}" in told


def test_without_spare_slots_the_command_says_what_one_would_give(recorded, capsys):
    _, moved, _ = _said(capsys, recorded)
    _, copied, _ = _said(capsys, recorded, "--slots-per-rank", 3)
    assert "for which a pass waits, is 0% less" in moved
    # Whatever moves: 80, 20, 20, 20 of 140 in each layer, so 35 / 80, and 70 / 100 together.
    assert "placed  balancedness 0.700 overall, 0.438 layer by layer" in moved
    would = moved.split("--slots-per-rank 3, it would be ")[1].split()[0]
    assert f"{would} layer by layer (least" in copied.split("placed  ")[1]


def test_one_rank_has_nobody_to_share_with(recorded, capsys):
    code, told, _ = _said(capsys, recorded, "--num-ranks", 1)
    assert code == 0
    assert "contiguous  balancedness 1.000 overall" in told
    assert "There is one rank" in told


def test_one_expert_a_rank_cannot_be_balanced(recorded, capsys):
    code, told, _ = _said(capsys, recorded, "--num-ranks", 8)
    assert code == 0
    assert "contiguous  balancedness 0.438 overall, 0.250 layer by layer" in told
    assert "so nothing can be balanced" in told
    assert "With copies of the hottest, --slots-per-rank 2, it would be 0." in told
    out = recorded / "placement.json"
    code, _, refused = _said(capsys, recorded, "--num-ranks", 8, "--out", out)
    assert code == 2
    assert refused.startswith(f"PlanError: {out} is not written: each rank holds one expert")
    assert not out.exists()


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--num-ranks", 3), "3 ranks cannot hold equally many of 8 experts"),
        (("--ep-size", 3), "--ep-size 3 does not divide the 4 ranks of"),
        (("--out", "/nowhere/placement.json"), "mkdir -p /nowhere"),
        (("--hostfile", "/nowhere"), "/nowhere: cannot be read"),
    ],
)
def test_refusals(recorded, capsys, args, says):
    code, _, refused = _said(capsys, recorded, *args)
    assert code == 2
    assert says in refused


def test_a_reader_that_has_gone_does_not_cost_the_placement(recorded):
    out = recorded / "placement.json"
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-u", "-m", "ds_moe_ep", "balance", recorded, "--out", out]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=env, timeout=60)
    finally:
        os.close(writer)
    assert b"Traceback" not in done.stderr
    assert read_placement(out).num_ranks == 4
