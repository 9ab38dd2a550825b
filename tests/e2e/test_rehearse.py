"""A cluster on one machine: its hosts, and a whole job on 64 ranks of eight of them."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import psutil
import pytest

from ds_moe_ep.bringup.report import PHASES
from ds_moe_ep.errors import HostfileError
from ds_moe_ep.hostfile import parse_hostfile, read_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts
from tests.helpers import run_command
from tests.helpers.hosts import needs_hosts
from tests.helpers.launch import REPO

HOSTFILE = REPO / "configs" / "hostfile.8x8"
MODEL = REPO / "configs" / "olmoe-1b-7b-ep64" / "config.json"
MOST_BYTES = 18e9
MOST_S = 480.0
_WAIT_S = 600.0  # on a machine that is very busy

_REHEARSE = [sys.executable, "-m", "ds_moe_ep", "rehearse", "--model", MODEL, "--hostfile"]
_BENCH_LAYER = [sys.executable, REPO / "launch" / "bench.py", "layer", "--world", "4"]
_BENCH_LAYER += ["--shape", "tiny", "--tokens", "4", "--routing", "uniform", "--peers"]
_BENCH_HOSTS = [*_BENCH_LAYER, "--dispatchers", "auto", "alltoall", "alltoall-2level"]
_BENCH_HOSTS += ["--rounds", "1", "--simulate-hosts", "--hostfile"]

# Makes a host and waits for ever, to be killed.
_MAKER = """
import os, sys, time
from ds_moe_ep.hostfile import parse_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts
with simulate_hosts(parse_hostfile("left-over slots=1", "test")) as hosts:
    print(hosts._keeper_pid, flush=True)
    time.sleep(600)
"""


def _wait_for(is_so: Callable[[], bool]) -> None:
    until_s = time.monotonic() + _WAIT_S
    while not is_so():
        assert time.monotonic() < until_s, f"not so after {_WAIT_S:.0f} s"
        time.sleep(0.1)


def _namespaces(processes: Iterable[psutil.Process]) -> set[str]:
    """The namespaces of processes, but for those of this one."""
    found = set()
    for pid in [os.getpid(), *(process.pid for process in processes)]:
        with contextlib.suppress(OSError):  # it has ended
            found |= {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("mnt", "net", "pid")}
    return found - {os.readlink(f"/proc/self/ns/{kind}") for kind in ("mnt", "net", "pid")}


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
    inside = _namespaces([psutil.Process(int(maker.stdout.readline()))])
    maker.kill()
    maker.wait()
    _wait_for(lambda: not inside & _namespaces(psutil.process_iter()))


@pytest.mark.parametrize("name", ["localhost", "a;reboot", "127.0.0.1", "x" * 64])
def test_hosts_that_cannot_be_made_are_refused_by_name(name):
    with (
        pytest.raises(HostfileError, match=re.escape(repr(name))),
        simulate_hosts(parse_hostfile(f"{name} slots=1", "test")),
    ):
        pass


@needs_hosts
@pytest.mark.slow
def test_64_ranks_of_8_hosts_write_what_one_process_does(tmp_path):
    calls = _put_before_pdsh(tmp_path / "bin")
    path = os.pathsep.join((str(calls.parent), os.environ["PATH"]))
    start_s = time.monotonic()
    ended = run_command([*_REHEARSE, HOSTFILE], env={"PATH": path}, timeout_s=850.0)
    took_s = time.monotonic() - start_s
    assert ended.returncode == 0, ended.stdout + ended.stderr
    phases = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert list(phases) == ["plan", "model", "hosts", "files", "launch", "outputs"]
    assert phases["plan"].startswith("EP64 TP1 PP1 DP1 on 8 hosts x 8 slots")
    assert phases["model"].startswith("16 of 16 layers with 64 experts, top-8")
    assert phases["hosts"].startswith("8 made in ")
    hosts = ",".join(host.name for host in read_hostfile(HOSTFILE).hosts)
    (started,) = (call for call in calls.read_text().splitlines() if "launcher.launch" in call)
    assert f" -w {hosts} " in started, started
    told = phases["launch"]
    assert re.findall(r"\[\d/4\] ([^:]+): (?:pass|warn) \(", told) == list(PHASES), told
    assert "64 ranks hold 1,024 experts of 16 layers, each once: 16 a rank, 1 of a layer" in told
    assert phases["outputs"] == "all 67 equal those of transformers in one process"
    memory = re.search(r"([\d.]+) GiB for all ranks together", phases["launch"])
    assert memory and float(memory[1]) * 2**30 < MOST_BYTES
    assert took_s < MOST_S, (
        f"{took_s:.0f} s with a load of {os.getloadavg()[2]:.1f} in the last 15 minutes; it took "
        f"227 s on 2 cores that other jobs used too.\n{ended.stdout}"
    )


@pytest.mark.slow
def test_where_no_hosts_can_be_made_the_ranks_are_on_one(tmp_path):
    ended = run_command(
        [*_REHEARSE, _two_hosts(tmp_path)],
        env={"PATH": _path_without_pdsh(tmp_path), "TMPDIR": str(tmp_path)},
        timeout_s=600.0,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    phases = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert list(phases) == ["plan", "model", "hosts", "files", "launch", "outputs"]
    assert phases["hosts"].startswith("none made: pdsh")
    assert "apt-get install -y pdsh openssh-server iproute2" in phases["hosts"]
    assert phases["hosts"].endswith(" Instead: 4 ranks on one host")
    memory = re.search(r"([\d.]+) GiB for all ranks together", phases["launch"])
    assert memory and 0 < float(memory[1]) * 2**30 < MOST_BYTES
    assert phases["outputs"] == "all 7 equal those of transformers in one process"
    assert not list(tmp_path.glob("ds-moe-ep-rehearsal-*"))


@pytest.mark.slow
def test_copies_of_the_experts_are_rehearsed(tmp_path):
    ended = run_command(
        [*_REHEARSE, _two_hosts(tmp_path), "--ep", "2"],
        env={"PATH": _path_without_pdsh(tmp_path), "TMPDIR": str(tmp_path)},
        timeout_s=600.0,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    phases = dict(line.split(maxsplit=1) for line in ended.stdout.splitlines())
    assert phases["plan"].startswith("EP2 TP1 PP1 DP2 on 2 hosts")
    assert "each once in each of 2 groups" in phases["launch"]
    assert phases["outputs"] == "all 7 equal those of transformers in one process"


def _put_before_pdsh(folder: Path) -> Path:
    """Writes a pdsh that notes its arguments and calls the real one; returns where it notes."""
    pdsh, calls = folder / "pdsh", folder / "calls"
    folder.mkdir()
    pdsh.write_text(
        f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> '{calls}'\nexec {shutil.which('pdsh')} \"$@\"\n"
    )
    pdsh.chmod(0o755)
    return calls


def _two_hosts(folder: Path) -> Path:
    hostfile = folder / "hostfile"
    hostfile.write_text("node-a slots=2\nnode-b slots=2\n")
    return hostfile


def _path_without_pdsh(folder: Path) -> str:
    """A PATH on which everything is found that is on this one, but pdsh."""
    places = []
    for number, place in enumerate(map(Path, os.get_exec_path())):
        if (place / "pdsh").exists():
            links = folder / f"path-{number}"
            links.mkdir()
            for program in place.iterdir():
                if program.name != "pdsh":
                    (links / program.name).symlink_to(program)
            place = links
        places.append(str(place))
    return os.pathsep.join(places)


@needs_hosts
@pytest.mark.slow
def test_the_benchmark_measures_several_hosts(tmp_path):
    command = [*_BENCH_HOSTS, _two_hosts(tmp_path), "--out", tmp_path]
    ended = run_command(command, timeout_s=300.0)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "best flat / auto | alltoall / auto |" in (tmp_path / "benchmarks.md").read_text()
    report = json.loads((tmp_path / "benchmarks" / "layer-hosts.json").read_text())
    assert report["heading"].endswith(f"on 2 hosts x 2 slots, {tmp_path / 'hostfile'}")
    (result,) = report["results"]
    assert list(result["seconds"]) == ["auto", "alltoall", "alltoall-2level"]
    (chosen,) = result["chosen"]["auto"]  # the prices are the same for all calls of a row
    assert f" {chosen} |" in (tmp_path / "benchmarks.md").read_text()


@needs_hosts
@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_a_rehearsal_that_is_ended_in_mid_launch_leaves_nothing(tmp_path, number, code):
    command = [*_REHEARSE, _two_hosts(tmp_path)]
    _assert_nothing_is_left(command, tmp_path, number, code, makes_hosts=True)


@pytest.mark.slow
def test_a_rehearsal_without_hosts_that_is_killed_in_mid_launch_leaves_nothing(tmp_path):
    command, path = [*_REHEARSE, _two_hosts(tmp_path)], _path_without_pdsh(tmp_path)
    _assert_nothing_is_left(command, tmp_path, signal.SIGKILL, -signal.SIGKILL, path=path)


@needs_hosts
@pytest.mark.slow
def test_a_benchmark_of_made_hosts_that_is_killed_leaves_nothing(tmp_path):
    command = [*_BENCH_HOSTS, _two_hosts(tmp_path), "--out", tmp_path]
    _assert_nothing_is_left(command, tmp_path, signal.SIGKILL, -signal.SIGKILL, makes_hosts=True)


@pytest.mark.slow
def test_a_benchmark_that_is_ended_leaves_nothing(tmp_path):
    command = [*_BENCH_LAYER, "--rounds", "1000", "--out", tmp_path]
    _assert_nothing_is_left(command, tmp_path, signal.SIGTERM, -signal.SIGTERM)


def _assert_nothing_is_left(
    command: Sequence[str | Path],
    folder: Path,
    number: signal.Signals,
    code: int,
    *,
    makes_hosts: bool = False,
    path: str | None = None,
) -> None:
    """Starts a command that makes ranks, ends it by a signal once they are there, and looks."""
    running = subprocess.Popen(
        command,
        cwd=REPO,
        env={**os.environ, "PATH": path or os.environ["PATH"], "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(lambda: _num_ranks(running.pid) >= 4 or running.poll() is not None)
        assert running.poll() is None
        processes = psutil.Process(running.pid).children(recursive=True)
        namespaces = _namespaces(processes)
        assert bool(namespaces) == makes_hosts
    finally:
        running.send_signal(number)
    assert running.wait(timeout=60) == code
    # The guard is the last to end. Not only in time: without its folder a job fails by itself.
    guard, *others = processes
    guard.wait(timeout=60)
    assert not [process for process in others if process.is_running()]
    assert not list(folder.glob("ds-moe-ep-*"))
    assert not namespaces & _namespaces(psutil.process_iter())
    assert not _processes_about(folder)


def _num_ranks(pid: int) -> int:
    """The ranks below a process that DeepSpeed's launcher has started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(pid).children(recursive=True)
        launchers = [each for each in below if "deepspeed.launcher.launch" in _words(each)]
        return sum(len(launcher.children()) for launcher in launchers)
    return 0


def _processes_about(folder: Path) -> list[list[str]]:
    """The commands of all processes that were given something in a folder."""
    words = [_words(process) for process in psutil.process_iter() if process.pid != os.getpid()]
    return [each for each in words if any(str(folder) in word for word in each)]


def _words(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:  # it has ended
        return []
