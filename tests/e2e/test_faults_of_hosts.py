"""Jobs on two hosts that lose a rank, a host or their user; clocks that differ; a port in use.

The hosts are simulated (ds_moe_ep/rehearsal/hosts.py); what a user starts there is run.sh.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from ds_moe_ep.hostfile import read_hostfile
from ds_moe_ep.rehearsal.hosts import SimulatedHosts, simulate_hosts, why_no_hosts
from tests.e2e.faulty_job import (
    BATCH,
    FAULTY_INFER,
    KEPT,
    WAIT_S,
    Job,
    count_messages,
    ended_in_time,
    start_and_wait_for_fault,
    write_run_sh,
)
from tests.helpers import run_command
from tests.helpers.launch import REPO

_reason = why_no_hosts()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(_reason is not None, reason=str(_reason))]

_TIMEOUT_S = 15.0  # how far the ranks of a busy machine may be apart


@contextlib.contextmanager
def _two_hosts(job: Job, slots: int, **variables: str) -> Iterator[SimulatedHosts]:
    hostfile = job.folder / "hostfile"
    hostfile.write_text(f"worker-0 slots={slots}\nworker-1 slots={slots}\n")
    with simulate_hosts(read_hostfile(hostfile), {"PYTHONPATH": str(REPO), **variables}) as hosts:
        yield hosts


def _run_sh(job: Job, model: Path, hosts: SimulatedHosts, *args: str, **env: str) -> list[str]:
    """Returns the command of a user who has the files of a run written and starts it."""
    script = write_run_sh(job, model, job.folder / "hostfile")
    binaries = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    settings = {"INFER": str(FAULTY_INFER), "PATH": binaries, **env}
    words = [f"{name}={value}" for name, value in settings.items()]
    own = job.words(*args)
    own = own[own.index("--input") :]  # the model is the script's
    return hosts.command(["env", *words, "bash", script, *own])


def test_a_kill_on_another_host_is_told_with_rank_host_and_step(
    faulty_job, undisturbed, tiny_model
):
    with _two_hosts(faulty_job, 2, **faulty_job.fault("3,batch 2,3,SIGKILL")) as hosts:
        command = _run_sh(faulty_job, tiny_model("olmoe"), hosts)
        result = run_command(command, timeout_s=WAIT_S)
        took_s = faulty_job.seconds_since_fault()
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    told = rf"DistributedError: \[rank 3 worker-1\] was ended by SIGKILL at {BATCH}, step 9\.{KEPT}"
    assert len(re.findall(told, output)) == 1, output
    # The other host may notice before it is ended, and then names who does not answer.
    others = re.findall(r"DistributedError: \[rank [01] worker-0\] lost other ranks at .*", output)
    assert count_messages(output) == 1 + len(others) <= 2, output
    assert all("(worker-1)" in line for line in others), output
    assert ended_in_time("a kill on another host", took_s, 20), output
    assert faulty_job.processes() == [], output
    assert faulty_job.finished()
    faulty_job.check_resumed(2, undisturbed)


def _break_while_ranks_load(job, model, kind):
    """Kills rank 3 of two hosts while all load; returns the output, and how long the end took."""
    with _two_hosts(job, 2, **job.fault(f"3,loading weights,0,{kind}")) as hosts:
        command = _run_sh(job, model, hosts, "--timeout", "100")
        result = run_command(command, timeout_s=WAIT_S)
        took_s = job.seconds_since_fault()
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    return output, took_s


# Ranks of the other host are busy, and come to no place where they would miss it.
def test_a_kill_while_ranks_load_ends_those_of_other_hosts_too(faulty_job, undisturbed, tiny_model):
    output, took_s = _break_while_ranks_load(faulty_job, tiny_model("olmoe"), "KILL_AMONG_READERS")
    told = r"DistributedError: \[rank 3 worker-1\] was ended by SIGKILL at loading weights\."
    assert len(re.findall(told, output)) == count_messages(output) == 1, output
    assert ended_in_time("a kill on another host at load", took_s, 20), output
    assert faulty_job.processes() == [], output
    faulty_job.check_resumed(2, undisturbed)


# Its launcher ends the other rank of its host, and no supervisor is left that could say why.
def test_a_rank_that_is_killed_with_its_supervisor_while_ranks_load_is_named(
    faulty_job, undisturbed, tiny_model
):
    kind = "KILL_BOTH_AMONG_READERS"
    output, took_s = _break_while_ranks_load(faulty_job, tiny_model("olmoe"), kind)
    told = (
        r"DistributedError: \[rank 0 worker-0\] at loading weights: rank 3 \(worker-1\) ended "
        r"without a word, at .*\. No answer from (?:rank 2 \(worker-1\), )?rank 3 \(worker-1\)\."
    )
    assert len(re.findall(told, output)) == count_messages(output) == 1, output
    assert ended_in_time("both killed on another host at load", took_s, 20), output
    assert faulty_job.processes() == [], output
    faulty_job.check_resumed(2, undisturbed)


def test_ranks_may_end_while_rank_0_closes_a_slow_monitor(faulty_job, undisturbed):
    """With nothing left to do none has counted a pass, so they still tell each other of it."""
    job = faulty_job
    job.launch(2, fault="0,writing the results,0,KILL_AT_RENAME")
    assert len(job.finished()) == 40 and not job.output.exists()
    metrics = ["--metrics", job.folder / "metrics"]
    result = job.launch(2, *metrics, fault="0,bringing up,0,CLOSE_SLOWLY")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "resuming: 40 of 40 prompts are done" in result.stdout
    assert count_messages(result.stderr) == 0, result.stderr
    assert job.seconds_since_fault() > 15.0
    assert job.output.read_bytes() == undisturbed


def test_run_sh_can_be_interrupted(faulty_job, undisturbed, tiny_model):
    # One rank is stopped on its host, and hears of the end from its launcher alone.
    with _two_hosts(faulty_job, 1, **faulty_job.fault("1,batch 2,3,SIGSTOP")) as hosts:
        command = _run_sh(faulty_job, tiny_model("olmoe"), hosts, "--timeout", str(WAIT_S))
        for number in (signal.SIGINT, signal.SIGTERM):
            with start_and_wait_for_fault(command, faulty_job) as process:
                start_s = time.monotonic()
                process.send_signal(number)  # the terminal's would reach this script only, too
                output, _ = process.communicate(timeout=WAIT_S)
                assert process.returncode == 130, output
                _, alive = psutil.wait_procs(faulty_job.processes(), timeout=WAIT_S)
                assert not alive, output
                took_s = time.monotonic() - start_s
                assert ended_in_time(f"{number.name} to run.sh", took_s, 10), output
    assert faulty_job.finished()
    faulty_job.check_resumed(2, undisturbed)


def test_a_host_that_is_cut_off_is_named_and_the_job_goes_on_without_it(faulty_job, tiny_model):
    job = faulty_job
    job.args += ["--max-new-tokens", "50"]
    with _two_hosts(job, 2, **job.fault("2,batch 2,2,NOTHING")) as hosts:
        command = _run_sh(job, tiny_model("olmoe"), hosts, "--timeout", str(_TIMEOUT_S))
        with start_and_wait_for_fault(command, job) as process:
            hosts.cut_off("worker-1")
            start_s = time.monotonic()
            output, _ = process.communicate(timeout=WAIT_S)
            took_s = time.monotonic() - start_s
    told = (
        r"DistributedError: \[rank [01] worker-0\] .* No answer from rank 2 \(worker-1\), rank 3 "
        rf"\(worker-1\)\.{KEPT}"
    )
    assert process.returncode == 1, output
    assert len(re.findall(told, output)) == count_messages(output) == 1, output
    assert ended_in_time("a host is cut off", took_s, _TIMEOUT_S + 20), output
    assert job.processes() == [], output
    assert job.finished()
    written, undisturbed = job.resume_and_run_undisturbed()
    assert written == undisturbed


def _lose_host(job: Job, model: Path, slots: int, fault: str, cut_off: bool = False) -> str:
    """Loses a host by a fault, or the second of two cut off; returns what the job said then."""
    bounds = ["--timeout", str(_TIMEOUT_S), "--start-timeout", str(WAIT_S)]
    with _two_hosts(job, slots, **job.fault(fault)) as hosts:
        command = _run_sh(job, model, hosts, *bounds)
        with start_and_wait_for_fault(command, job) as process:
            start_s = time.monotonic()
            if cut_off:
                hosts.cut_off("worker-1")
            output, _ = process.communicate(timeout=WAIT_S)
            took_s = time.monotonic() - start_s
            assert process.returncode == 1, output
            assert ended_in_time(f"{fault} on a host that is lost", took_s, _TIMEOUT_S + 20), output
            _, alive = psutil.wait_procs(job.processes(), timeout=20)  # cut off, they notice alone
            assert not alive, output
    assert count_messages(output) == 1, output
    return output


# Stopped whole are its one rank and that rank's supervisor: nobody there can see it.
@pytest.mark.parametrize(
    ("slots", "fault", "cut_off"),
    [
        (2, "2,loading weights,0,READ_SLOWLY", True),
        (1, "1,loading weights,0,STOP_BOTH_READING", False),
    ],
    ids=["cut off", "stopped whole"],
)
def test_a_host_that_is_lost_while_ranks_load_is_named(
    faulty_job, undisturbed, tiny_model, slots: int, fault: str, cut_off: bool
) -> None:
    output = _lose_host(faulty_job, tiny_model("olmoe"), slots, fault, cut_off)
    silent = ", ".join(rf"rank {rank} \(worker-1\)" for rank in range(slots, 2 * slots))
    told = (
        rf"DistributedError: \[rank 0 worker-0\] at loading weights: rank {slots} \(worker-1\) was "
        rf"last heard of 15 s ago, at .*\. No answer from {silent}\."
    )
    assert re.search(told, output), output
    faulty_job.check_resumed(2, undisturbed)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "0,loading weights,0,STOP_BOTH_READING",
            rf"at loading weights: rank 0 \(worker-0\) was last heard of {_TIMEOUT_S:.0f} s ago, .*"
            r"\. No answer from rank 0 \(worker-0\)\.",
        ),
        (
            "0,batch 2,2,STOP_BOTH",
            rf"lost other ranks at {BATCH}, step 8: .*No answer from rank 0 \(worker-0\)\.{KEPT}",
        ),
    ],
    ids=["at load", "in decode"],
)
def test_rank_0_alone_on_a_host_that_is_stopped_whole_ends_with_the_job(
    faulty_job, undisturbed, tiny_model, fault: str, told: str
) -> None:
    output = _lose_host(faulty_job, tiny_model("olmoe"), 1, fault)
    assert re.search(rf"DistributedError: \[rank 1 worker-1\] {told}", output), output
    faulty_job.check_resumed(2, undisturbed)


# Listens where rank 0 is to, and takes calls in silence.
_STRANGER = """
import socket, sys, time
listener = socket.create_server(("", int(sys.argv[1])))
print("listening", flush=True)
time.sleep(600)
"""


def test_a_port_in_use_keeps_ranks_of_other_hosts_no_longer(faulty_job, tiny_model):
    port = "29500"  # DeepSpeed's own choice
    with _two_hosts(faulty_job, 1) as hosts:
        script = faulty_job.folder / "stranger.py"
        script.write_text(_STRANGER)
        stranger = hosts.command(["ssh", "-tt", "worker-0", sys.executable, script, port])
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(stranger, text=True, **pipes) as listens:
            assert listens.stdout.readline().strip() == "listening"
            command = _run_sh(
                faulty_job, tiny_model("olmoe"), hosts, INFER=str(REPO / "launch" / "infer.py")
            )
            start_s = time.monotonic()
            result = run_command(command, timeout_s=WAIT_S)
            took_s = time.monotonic() - start_s
            listens.kill()
    output = result.stdout + result.stderr
    assert result.returncode == 1, output
    # Neither host can tell the other.
    for rank, why in ((0, ".*address already in use"), (1, "what listens there does not answer")):
        told = rf"DistributedError: \[rank {rank} worker-{rank}\] the 2 ranks did not meet at "
        assert len(re.findall(rf"{told}\S+:{port}: {why}", output)) == 1, output
    assert count_messages(output) == 2, output
    assert ended_in_time("a port in use, start included", took_s, 90), output
    assert faulty_job.processes() == [], output
    assert list(faulty_job.output.parent.iterdir()) == []


def _run_on_skewed_hosts(job: Job, fault: str) -> subprocess.CompletedProcess[str]:
    """Runs a job on two hosts of a rank each, of which the second is an hour ahead."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime. Install: apt-get install -y faketime")
    skew = {"SKEWED": "worker-1", "FAKETIME_LIBRARY": str(library)}
    with _two_hosts(job, 1, **job.fault(fault), **skew) as hosts:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile"]
        launcher += [job.folder / "hostfile", "--launcher", "pdsh"]
        launcher += ["--master_addr", hosts.addresses["worker-0"]]
        script = Path(__file__).with_name("skewed_infer.py")
        command = [*launcher, script, *job.words("--timeout", str(_TIMEOUT_S))]
        return run_command(hosts.command(command), timeout_s=WAIT_S)


def test_clocks_of_hosts_need_not_agree(faulty_job, undisturbed):
    job = faulty_job
    broken = _run_on_skewed_hosts(job, "1,batch 2,2,SIGSTOP")
    output = broken.stdout + broken.stderr
    early, ahead = (float((job.folder / f"clock-{rank}").read_text()) for rank in (0, 1))
    assert 3500 < ahead - early < 3700
    assert broken.returncode == 1, output
    told = rf"DistributedError: \[rank 0 .* No answer from rank 1 \(worker-1\)\.{KEPT}"
    assert len(re.findall(told, output)) == count_messages(output) == 1, output
    took_s = job.seconds_since_fault()
    assert ended_in_time("a stopped rank on another host", took_s, _TIMEOUT_S + 20), output
    assert job.processes() == [], output
    whole = _run_on_skewed_hosts(job, "-1,,0,NOTHING")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert job.output.read_bytes() == undisturbed
