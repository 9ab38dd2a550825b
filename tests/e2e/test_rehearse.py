"""A cluster on one machine: its hosts, and a whole job on 64 ranks of eight of them."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_moe_ep.errors import HostfileError
from ds_moe_ep.hostfile import parse_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts, why_no_hosts
from tests.helpers import run_command
from tests.helpers.launch import REPO

HOSTFILE = REPO / "configs" / "hostfile.8x8"
MODEL = REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json"
MOST_GIB = 18.0

_reason = why_no_hosts()
needs_hosts = pytest.mark.skipif(_reason is not None, reason=str(_reason))

# Makes a host and waits for ever, to be killed.
_MAKER = """
import os, sys, time
from ds_moe_ep.hostfile import parse_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts
with simulate_hosts(parse_hostfile("left-over slots=1", "test")) as hosts:
    print(hosts._keeper_pid, flush=True)
    time.sleep(600)
"""


def _output(hosts, *command: str) -> str:
    return run_command(hosts.command(command)).stdout


@needs_hosts
def test_hosts_have_names_addresses_and_ssh_and_leave_this_machine_alone():
    own_files = [Path("/etc/hosts"), Path("/etc/ssh/ssh_config"), Path("/etc/nsswitch.conf")]
    before = [path.read_bytes() for path in own_files]
    with simulate_hosts(parse_hostfile("node-a slots=2\n10.1.2.3 slots=1", "test")) as hosts:
        assert _output(hosts, "ssh", "node-a", "hostname") == "node-a\n"
        assert _output(hosts, "ssh", "10.1.2.3", "hostname", "-I").split() == ["10.1.2.3"]
        assert _output(hosts, "ssh", "10.1.2.3", "ssh node-a hostname") == "node-a\n"
        assert hosts.memory_bytes() > 0
        assert [path.read_bytes() for path in own_files] == before
        hosts.cut_off("node-a")
        ended = run_command(
            hosts.command(
                ["ssh", "-oConnectTimeout=1", "-oConnectionAttempts=1", "node-a", "hostname"]
            )
        )
        assert ended.returncode != 0


@needs_hosts
def test_nothing_is_left_of_hosts_whose_maker_is_killed():
    maker = subprocess.Popen([sys.executable, "-c", _MAKER], stdout=subprocess.PIPE, cwd=REPO)
    assert maker.stdout is not None
    keeper = Path(f"/proc/{int(maker.stdout.readline())}")
    namespace = (keeper / "ns" / "pid").readlink()
    maker.kill()
    maker.wait()

    def is_gone() -> bool:
        inside = []
        for process in Path("/proc").glob("[0-9]*/ns/pid"):
            try:
                inside.append(process.readlink() == namespace)
            except OSError:
                continue
        return not any(inside)

    for _ in range(600):
        if is_gone():
            return
        time.sleep(0.1)
    raise AssertionError("a process is still there after a minute")


@pytest.mark.parametrize("name", ["localhost", "a;reboot", "127.0.0.1", "x" * 64])
def test_hosts_that_cannot_be_made_are_refused_by_name(name):
    with (
        pytest.raises(HostfileError, match=re.escape(repr(name))),
        simulate_hosts(parse_hostfile(f"{name} slots=1", "test")),
    ):
        pass


@needs_hosts
@pytest.mark.slow
def test_64_ranks_of_8_hosts_write_what_one_process_does():
    command = [sys.executable, "-m", "ds_moe_ep", "rehearse", "--model", MODEL]
    ended = run_command([*command, "--hostfile", HOSTFILE], timeout_s=850.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    phases = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert list(phases) == ["plan", "model", "hosts", "files", "launch", "outputs"]
    assert phases["plan"].startswith("EP64 TP1 PP1 DP1 on 8 hosts x 8 slots")
    assert phases["model"].startswith("16 of 16 layers with 64 experts, top-8")
    assert phases["outputs"] == "all 67 equal those of transformers in one process"
    memory = re.search(r"([\d.]+) GiB for all ranks together", phases["launch"])
    assert memory and float(memory[1]) < MOST_GIB


@needs_hosts
@pytest.mark.slow
def test_the_benchmark_measures_several_hosts(tmp_path):
    (tmp_path / "hostfile").write_text("node-a slots=2\nnode-b slots=2\n")
    where = ["--hostfile", tmp_path / "hostfile", "--simulate-hosts", "--world", "4"]
    sides = ["--dispatchers", "auto", "alltoall", "alltoall-2level", "--peers"]
    work = ["--shape", "tiny", "--tokens", "4", "--routing", "uniform", "--rounds", "1"]
    script = REPO / "launch" / "bench.py"
    ended = run_command(
        [sys.executable, script, "layer", *where, *work, "--out", tmp_path, *sides], timeout_s=300.0
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best flat / auto | alltoall / auto |" in (tmp_path / "benchmarks.md").read_text()
    report = json.loads((tmp_path / "benchmarks" / "layer-hosts.json").read_text())
    assert report["heading"].endswith(f"on 2 hosts x 2 slots, {tmp_path / 'hostfile'}")
    (result,) = report["results"]
    assert list(result["seconds"]) == ["auto", "alltoall", "alltoall-2level"]


@needs_hosts
def test_a_rehearsal_that_is_told_to_stop_leaves_no_folder(tmp_path):
    (tmp_path / "hostfile").write_text("node-a slots=2\nnode-b slots=2\n")
    command = [sys.executable, "-m", "ds_moe_ep", "rehearse", "--model", MODEL]
    running = subprocess.Popen(
        [*command, "--hostfile", tmp_path / "hostfile"],
        cwd=REPO,
        env={"TMPDIR": str(tmp_path), "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("files"):
            break
    running.send_signal(signal.SIGTERM)
    assert running.wait(timeout=120) == 128 + signal.SIGTERM
    assert not list(tmp_path.glob("ds-moe-ep-rehearsal-*"))
