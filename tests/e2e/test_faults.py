"""Jobs that lose a rank, their patience or their user, and go on where they stopped.

Each is a real launch, and a fault of one rank happens at a known place (faulty_infer.py). Bounds on
seconds are what an operator is promised. Hosts: test_faults_of_hosts.py; disks:
test_faults_of_disks.py.
"""

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import psutil
import pytest

from tests.e2e.faulty_job import (
    BATCH,
    FAULTY_INFER,
    HOST,
    KEPT,
    NEW_TOKENS,
    WAIT_S,
    Job,
    count_messages,
    ended_in_time,
    start_and_wait_for_fault,
)
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO, free_port

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Fault:
    """A fault, and what the job says and does then.

    Attributes:
        num_ranks: Ranks of the run.
        what: See faulty_infer.py.
        says: A pattern of the one message.
        within_s: From the fault to the end of the launcher.
        args: Further arguments.
        is_forked: See `Job.launch`.
    """

    num_ranks: int
    what: str
    says: str
    within_s: float = 20.0
    args: tuple[str, ...] = ()
    is_forked: bool = True


def _killed(rank: int, where: str) -> str:
    return rf"DistributedError: \[rank {rank} {HOST}\] was ended by SIGKILL at {where}\."


def _stopped_at_load(rank: int, what: str) -> Fault:
    """Long before `--start-timeout`, which bounds those that are only slow."""
    return Fault(
        4,
        f"{rank},loading weights,0,{what}",
        rf"DistributedError: \[rank \d {HOST}\] at loading weights: rank {rank} \({HOST}\) was "
        rf"last heard of {_TIMEOUT_S:.0f} s ago, at .*\. No answer from rank {rank} \({HOST}\)\.",
        within_s=_TIMEOUT_S + 20,
        args=("--timeout", str(_TIMEOUT_S), "--start-timeout", str(WAIT_S)),
    )


def _stopped(rank: int, where: str) -> Fault:
    return Fault(
        4,
        f"{rank},{where},SIGSTOP",
        rf"DistributedError: \[rank \d {HOST}\] .* No answer from rank {rank} \({HOST}\)\.{KEPT}",
        within_s=_TIMEOUT_S + 20,
        args=("--timeout", str(_TIMEOUT_S)),
    )


_TIMEOUT_S = 15.0  # how far the ranks of a busy machine may be apart
_FAULTS = [
    Fault(4, "1,loading weights,0,SIGKILL", _killed(1, "loading weights")),
    Fault(4, "0,loading weights,0,SIGKILL", _killed(0, "loading weights")),
    Fault(4, "3,bringing up,0,SIGKILL", _killed(3, "bringing up")),
    _stopped_at_load(3, "STOP_READING"),
    _stopped_at_load(0, "STOP_BOTH_READING"),
    # In prefill. Rank 0 holds the store.
    Fault(4, "2,batch 1,1,SIGKILL", _killed(2, f"{BATCH}, step 1") + KEPT),
    Fault(4, "0,batch 1,1,SIGKILL", _killed(0, f"{BATCH}, step 1") + KEPT),
    _stopped(1, "batch 1,1"),
    # In decode.
    Fault(4, "0,batch 2,3,SIGKILL", _killed(0, f"{BATCH}, step 9") + KEPT, is_forked=False),
    _stopped(3, "batch 2,2"),
    Fault(
        2,
        "1,batch 2,0,RAISE",
        rf"\[rank 1 {HOST}\] at {BATCH}, step 6: Traceback(.|\n)*"
        rf"LookupError: nobody expected this prompt\n{KEPT}",
    ),
    Fault(
        4,
        "1,batch 2,4,OUT_OF_MEMORY",
        rf"ResourceError: \[rank 1 {HOST}\] out of memory at {BATCH}, step 10: .*"
        rf"can't allocate memory.*Lower --batch-size.*{KEPT}",
    ),
    Fault(
        2,
        r"1,batch (\d+) of \1 ,3,SIGKILL",  # the last
        _killed(1, r"batch (\d+) of \1 \(prompts .*\), step \d+") + KEPT,
    ),
    Fault(
        2,
        "1,helping the others,0,SIGKILL",
        _killed(1, r"helping the others to their end, step \d+") + KEPT,
    ),
    Fault(
        4,
        "0,writing the results,0,KILL_AT_RENAME",
        _killed(0, r"writing the results(?:, step \d+)?") + KEPT,  # there may be no pass left
    ),
]


def test_whatever_happens_nothing_is_lost_and_nothing_done_twice(faulty_job, undisturbed):
    """One job suffers it all, resumed each time, with other numbers of ranks in between."""
    job, finished = faulty_job, []
    for fault in _FAULTS:
        result = job.launch(
            fault.num_ranks, *fault.args, fault=fault.what, is_forked=fault.is_forked
        )
        since_fault_s = job.seconds_since_fault()
        output = f"{fault}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == 1, output
        assert len(re.findall(fault.says, result.stderr)) == 1, output
        assert count_messages(result.stderr) == 1, output
        assert ended_in_time(fault.what, since_fault_s, fault.within_s), output
        assert job.processes() == [], output
        assert not job.output.exists()
        assert set(finished) <= set(job.finished()), output
        finished = job.finished()
        assert len(finished) == len(set(finished)), output
    assert len(finished) == 40  # and the results were all but written
    (written,) = job.output.parent.glob(".out.jsonl.*.tmp")
    assert written.read_bytes() == undisturbed
    said = job.check_resumed(4, undisturbed)
    assert "resuming: 40 of 40 prompts are done" in said
    assert [path.name for path in job.output.parent.iterdir()] == ["out.jsonl"]


def test_two_hundred_prompts_on_eight_ranks_survive_five_kills(tiny_model, write_prompts, tmp_path):
    chance = random.Random(5)
    lengths = [chance.choice((1, 2, 3, 5, 9, 17, 33, 50)) for _ in range(200)]
    prompts = {
        f"p{i}": [chance.randrange(3, VOCAB_SIZE) for _ in range(n)] for i, n in enumerate(lengths)
    }
    path = write_prompts(tmp_path / "in.jsonl", prompts)
    job = Job(tiny_model("olmoe"), path, tmp_path / "eight")
    finished: list[int] = []
    for _ in range(5):
        rank, step = chance.randrange(8), chance.randrange(NEW_TOKENS + 1, 3 * NEW_TOKENS)
        result = job.launch(8, fault=f"{rank},,{step},SIGKILL")
        output = f"rank {rank} step {step}\n{result.stdout}\n{result.stderr}"
        assert ended_in_time("a kill of 8", job.seconds_since_fault(), 20), output
        assert result.returncode == 1, output
        told = _killed(rank, f".*, step {step}")
        assert len(re.findall(told, result.stderr)) == count_messages(result.stderr) == 1, output
        before, finished = finished, job.finished()
        assert set(before) < set(finished), output
        assert len(finished) == len(set(finished)), output
    alone = Job(tiny_model("olmoe"), path, tmp_path / "one")
    said = job.check_resumed(4, alone.run_undisturbed())
    assert f"resuming: {len(finished)} of 200 prompts are done" in said


def _break_and_resume(job: Job, *args: str) -> tuple[bytes, bytes]:
    """Returns what a job writes that is killed on 4 ranks and goes on on 2, and an unbroken one."""
    job.args += args
    broken = job.launch(4, fault="2,batch 2,1,SIGKILL")
    assert broken.returncode == 1, broken.stdout + broken.stderr
    assert job.finished()
    return job.resume_and_run_undisturbed()


def test_sampling_goes_on_as_if_nothing_had_happened(faulty_job, undisturbed):
    sampling = ["--temperature", "0.9", "--top-p", "0.95", "--seed", "7"]
    written, expected = _break_and_resume(faulty_job, *sampling)
    assert written == expected != undisturbed


def test_scoring_goes_on_and_only_rounding_tells(faulty_job):
    # Sums depend in their last bits on who shares a batch, so bytes may differ.
    written, expected = (
        [json.loads(line) for line in content.splitlines()]
        for content in _break_and_resume(faulty_job, "--task", "score")
    )
    assert [line["id"] for line in written] == [f"p{i}" for i in range(40)]
    for line, other in zip(written, expected, strict=True):
        for name in ("logprob", "token_logprobs"):
            assert line.pop(name) == pytest.approx(other.pop(name), rel=1e-5, abs=1e-6)
        assert line == other


def _running(job: Job, fault: str) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Starts a job on 4 ranks, of which all others wait for one."""
    env = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO), **job.fault(fault)}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher += ["--num_gpus=4", f"--master_port={free_port()}"]
    command = [*launcher, FAULTY_INFER, *job.words("--timeout", str(WAIT_S))]
    return start_and_wait_for_fault(command, job, env)


def _interrupt(process: subprocess.Popen[str], how: str) -> None:
    if how == "Ctrl-C":  # the terminal sends it to all
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGTERM to deepspeed":
        process.terminate()
    else:
        (launcher,) = psutil.Process(process.pid).children()
        launcher.send_signal(signal.SIGKILL if how.startswith("SIGKILL") else signal.SIGTERM)


def test_an_interrupted_job_leaves_no_process_and_can_be_resumed(faulty_job, undisturbed):
    # The `deepspeed` command ends by SIGINT (130 in a shell) and by SIGTERM (143) as it does
    # everywhere; its launcher, told to end, has exit code 1. It does not see that one was killed.
    codes = {
        "Ctrl-C": -signal.SIGINT,
        "SIGTERM to deepspeed": -signal.SIGTERM,
        "SIGTERM to its launcher": 1,
        "SIGKILL to its launcher": 0,
    }
    job = faulty_job
    for how, code in codes.items():
        with _running(job, "1,batch 2,3,SIGSTOP") as process:
            if how == "Ctrl-C":
                second = job.launch(2)
                assert second.returncode == 2, second.stdout + second.stderr
                assert re.search("another job is writing this output: process .*", second.stderr)
                assert "Traceback" not in second.stderr
            start_s = time.monotonic()
            _interrupt(process, how)
            output, _ = process.communicate(timeout=WAIT_S)
            assert process.returncode == code, output
            _, alive = psutil.wait_procs(job.processes(), timeout=WAIT_S)
            assert not alive, output
            assert ended_in_time(how, time.monotonic() - start_s, 10), output
            if how != "SIGTERM to its launcher":
                assert re.search(rf"interrupted \(.*\) at {BATCH}, step \d+\.{KEPT}", output)
            assert output.count("Traceback") == (how == "Ctrl-C")  # DeepSpeed's own
    assert job.finished()
    job.check_resumed(2, undisturbed)


def test_a_job_is_interrupted_as_it_loads_and_as_it_writes(faulty_job, undisturbed):
    job = faulty_job
    for what in ("1,loading weights,0,READ_SLOWLY", "0,writing the results,0,WRITE_SLOWLY"):
        with _running(job, what) as process:
            start_s = time.monotonic()
            _interrupt(process, "Ctrl-C")
            output, _ = process.communicate(timeout=WAIT_S)
            _, alive = psutil.wait_procs(job.processes(), timeout=WAIT_S)
            assert not alive, output
            assert ended_in_time(f"Ctrl-C, {what}", time.monotonic() - start_s, 10), output
        assert process.returncode == -signal.SIGINT, output
        assert re.search(rf"interrupted \(SIGINT\) at {what.split(',')[1]}", output), output
    assert not job.output.exists()
    assert "resuming: 40 of 40 prompts are done" in job.check_resumed(2, undisturbed)
    assert [path.name for path in job.output.parent.iterdir()] == ["out.jsonl"]


def test_a_rank_that_is_killed_with_its_supervisor_ends_the_job(faulty_job, undisturbed):
    """Nobody is left who could name it: DeepSpeed's launcher shows the signal as its exit code."""
    result = faulty_job.launch(4, fault="2,batch 2,2,KILL_BOTH")
    output = result.stdout + result.stderr
    assert result.returncode == 256 - signal.SIGKILL, output
    assert "exits with return code = -9" in output
    assert ended_in_time("both are killed", faulty_job.seconds_since_fault(), 20), output
    assert faulty_job.processes() == [], output
    assert faulty_job.finished()
    faulty_job.check_resumed(2, undisturbed)


def test_a_port_in_use_is_told_at_once(faulty_job):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = faulty_job.launch(4, port=port)
    assert result.returncode == 1, result.stdout + result.stderr
    told = (
        rf"DistributedError: \[rank 0 {HOST}\] the 4 ranks did not meet at \S+:{port}: .*"
        "--master_port"
    )
    assert re.findall(told, result.stderr), result.stderr
    assert count_messages(result.stderr) == 1, result.stderr
    assert list(faulty_job.output.parent.iterdir()) == []
