"""Jobs that lose a rank, their patience, their folder or their user, and go on where they stopped.

Each is a real launch, and a fault of one rank happens at a known place (faulty_infer.py). Bounds on
seconds are what an operator is promised, and a minute for machines on which tests compete.
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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from ds_moe_ep.hostfile import read_hostfile
from ds_moe_ep.rehearsal.hosts import simulate_hosts, why_no_hosts
from tests.helpers import launch_infer, run_command
from tests.helpers.families import VOCAB_SIZE
from tests.helpers.launch import REPO, free_port

pytestmark = pytest.mark.slow

_PROMPTS = {f"p{i}": [3 + i, 60 - i, 7][: 1 + i % 3] for i in range(40)}
_NEW_TOKENS = 6
_FAULTY = REPO / "tests" / "e2e" / "faulty_infer.py"
_BUSY_S = 60.0
_WAIT_S = 600.0  # for a job to come to a place, on a machine that is very busy


class Job:
    """A job in a folder of its own, started again and again."""

    def __init__(self, model: Path, prompts: Path, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "results" / "out.jsonl"
        self.partial = folder / "results" / "out.jsonl.partial"
        self.output.parent.mkdir(parents=True)
        self.mark = folder / "mark"
        self.args = ["--model", model, "--input", prompts, "--output", self.output]
        self.args += ["--max-new-tokens", str(_NEW_TOKENS), "--batch-size", "2", "--resume"]

    def run_undisturbed(self) -> bytes:
        """Runs it on one rank, without a launcher, and returns what it writes."""
        command = [sys.executable, REPO / "launch" / "infer.py", *self.args]
        env = {"DS_ACCELERATOR": "cpu"}
        result = run_command(command, env=env, timeout_s=_WAIT_S, is_forked=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.output.read_bytes()

    def launch(self, num_ranks: int, *args: str | Path, fault: str | None = None, **options):
        if fault is not None:
            self.mark.unlink(missing_ok=True)
            options["env"] = {"FAULT": fault, "FAULT_MARK": str(self.mark)}
            options["script"] = _FAULTY
        options = {"is_forked": True, **options}
        return launch_infer([*self.args, *args], num_ranks=num_ranks, **options)

    def seconds_since_fault(self) -> float:
        return time.time() - self.mark.stat().st_mtime

    def processes(self) -> list[psutil.Process]:
        """The ranks and launchers of this job."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if str(self.output) in process.cmdline():
                    found.append(process)
        return found

    def finished(self) -> list[int]:
        """The prompts in the journals, by index, each as often as it is there."""
        lines = [
            json.loads(line)
            for path in self.partial.glob("rank-*.jsonl")
            for line in path.read_text().splitlines()
            if line
        ]
        return [index for index, _ in lines]


@pytest.fixture
def job(tiny_model, write_prompts, tmp_path) -> Job:
    prompts = write_prompts(tmp_path / "in.jsonl", _PROMPTS)
    return Job(tiny_model("olmoe"), prompts, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(tiny_model, write_prompts, tmp_path_factory) -> bytes:
    """What the job writes if nothing happens, on one rank."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts = write_prompts(folder / "in.jsonl", _PROMPTS)
    return Job(tiny_model("olmoe"), prompts, folder).run_undisturbed()


@dataclass(frozen=True)
class Fault:
    """A fault, and what the job says and does then.

    Attributes:
        num_ranks: Ranks of the run.
        what: See faulty_infer.py.
        says: A pattern of the one message.
        within_s: From the fault to the end of the launcher.
        args: Further arguments.
    """

    num_ranks: int
    what: str
    says: str
    within_s: float = 20.0
    args: tuple[str, ...] = ()


_BATCH = r"batch \d+ of \d+ \(prompts .*\)"
_KEPT = r" Finished prompts are in .*out\.jsonl\.partial: go on with --resume\."
_TIMEOUT_S = 15.0  # how far the ranks of a busy machine may be apart
_FAULTS = [
    Fault(
        4,
        "1,loading weights,0,SIGKILL",
        r"DistributedError: \[rank 1 \S+\] was ended by SIGKILL at loading weights\.",
    ),
    Fault(
        4,
        "2,batch 1,1,SIGKILL",  # the prefill of the first batch
        rf"DistributedError: \[rank 2 \S+\] was ended by SIGKILL at {_BATCH}, step 1\.{_KEPT}",
    ),
    Fault(
        4,
        f"0,batch 2,{_NEW_TOKENS + 3},SIGKILL",  # in decode, and the rank that holds the store
        rf"DistributedError: \[rank 0 \S+\] was ended by SIGKILL at {_BATCH}, step 9\.{_KEPT}",
    ),
    Fault(
        4,
        f"3,batch 2,{_NEW_TOKENS + 2},SIGSTOP",
        rf"DistributedError: \[rank \d \S+\] .* No answer from rank 3 \(\S+\)\.{_KEPT}",
        within_s=_TIMEOUT_S + 20,
        args=("--timeout", str(_TIMEOUT_S)),
    ),
    Fault(
        2,
        "1,batch 2,0,RAISE",
        rf"\[rank 1 \S+\] at {_BATCH}, step 6: Traceback(.|\n)*"
        rf"LookupError: nobody expected this prompt\n{_KEPT}",
    ),
    Fault(
        4,
        f"1,batch 2,{_NEW_TOKENS + 4},OUT_OF_MEMORY",
        rf"ResourceError: \[rank 1 \S+\] out of memory at {_BATCH}, step 10: .*"
        rf"can't allocate memory.*Lower --batch-size.*{_KEPT}",
    ),
    Fault(
        2,
        "1,helping the others,0,SIGKILL",
        r"DistributedError: \[rank 1 \S+\] was ended by SIGKILL at helping the others to their "
        rf"end, step \d+\.{_KEPT}",
    ),
]


def _count_messages(said: str) -> int:
    return len(re.findall(r"Traceback|(?:Distributed|Resource)Error: ", said))


def test_whatever_happens_nothing_is_lost_and_nothing_done_twice(job, undisturbed):
    """One job suffers it all, resumed each time, with other numbers of ranks in between."""
    finished: list[int] = []
    for fault in _FAULTS:
        result = job.launch(fault.num_ranks, *fault.args, fault=fault.what, timeout_s=_WAIT_S)
        since_fault_s = job.seconds_since_fault()
        output = f"{fault}\n{result.stdout}\n{result.stderr}"
        assert result.returncode == 1, output
        assert len(re.findall(fault.says, result.stderr)) == 1, output
        assert _count_messages(result.stderr) == 1, output
        assert since_fault_s < fault.within_s + _BUSY_S, output
        assert job.processes() == [], output
        assert not job.output.exists()
        assert set(finished) <= set(job.finished()), output
        finished = job.finished()
        assert len(finished) == len(set(finished)), output
    assert len(finished) > len(_PROMPTS) / 2
    result = job.launch(4)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resuming: {len(finished)} of 40 prompts are done" in result.stdout
    assert job.output.read_bytes() == undisturbed
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
        rank, step = chance.randrange(8), chance.randrange(_NEW_TOKENS + 1, 3 * _NEW_TOKENS)
        result = job.launch(8, fault=f"{rank},,{step},SIGKILL", timeout_s=_WAIT_S)
        output = f"rank {rank} step {step}\n{result.stdout}\n{result.stderr}"
        assert job.seconds_since_fault() < 20 + _BUSY_S, output
        assert result.returncode == 1, output
        told = rf"DistributedError: \[rank {rank} \S+\] was ended by SIGKILL at .*, step {step}\."
        assert len(re.findall(told, result.stderr)) == _count_messages(result.stderr) == 1, output
        before, finished = finished, job.finished()
        assert set(before) < set(finished), output
        assert len(finished) == len(set(finished)), output
    result = job.launch(8)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"resuming: {len(finished)} of 200 prompts are done" in result.stdout
    alone = Job(tiny_model("olmoe"), path, tmp_path / "one")
    assert job.output.read_bytes() == alone.run_undisturbed()


@contextlib.contextmanager
def _started(
    command: Sequence[str | Path], job: Job, env: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Starts a job, waits until its fault has happened, and ends what is left of it."""
    job.mark.unlink(missing_ok=True)
    process = subprocess.Popen(
        [str(part) for part in command],
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Tests that run in the background of a shell have it ignored, and so would the job.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until_s = time.monotonic() + _WAIT_S
        while not job.mark.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until_s
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _running(job: Job, num_ranks: int) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    """Starts a job that waits in its second batch, for `--timeout`, for a rank that is stopped."""
    env = {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(REPO)}
    env |= {"FAULT": f"1,batch 2,{_NEW_TOKENS + 3},SIGSTOP", "FAULT_MARK": str(job.mark)}
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    launcher += [f"--num_gpus={num_ranks}", f"--master_port={free_port()}"]
    return _started([*launcher, _FAULTY, *job.args, "--timeout", str(_WAIT_S)], job, env)


def _interrupt(job: Job, process: subprocess.Popen[str], how: str) -> None:
    if how == "Ctrl-C":  # the terminal sends it to all
        os.killpg(process.pid, signal.SIGINT)
    elif how == "SIGTERM to deepspeed":
        process.terminate()
    else:
        (launcher,) = psutil.Process(process.pid).children()
        launcher.terminate()


def test_an_interrupted_job_leaves_no_process_and_can_be_resumed(job, undisturbed):
    # The `deepspeed` command ends by SIGINT (130 in a shell) and by SIGTERM (143) as it does
    # everywhere; its launcher, told to end, has exit code 1.
    codes = {
        "Ctrl-C": -signal.SIGINT,
        "SIGTERM to deepspeed": -signal.SIGTERM,
        "SIGTERM to its launcher": 1,
    }
    for how, code in codes.items():
        with _running(job, 4) as process:
            if how == "Ctrl-C":
                second = job.launch(2, timeout_s=_WAIT_S)
                assert second.returncode == 2, second.stdout + second.stderr
                assert re.search("another job is writing this output: process .*", second.stderr)
                assert "Traceback" not in second.stderr
            start_s = time.monotonic()
            _interrupt(job, process, how)
            output, _ = process.communicate(timeout=_WAIT_S)
            assert process.returncode == code, output
            _, alive = psutil.wait_procs(job.processes(), timeout=10 + _BUSY_S)
            assert not alive, output
            assert time.monotonic() - start_s < 10 + _BUSY_S, output
            if how != "SIGTERM to its launcher":
                assert re.search(rf"interrupted \(.*\) at {_BATCH}, step \d+\.{_KEPT}", output)
            assert output.count("Traceback") == (how == "Ctrl-C")  # DeepSpeed's own
    assert job.finished()
    result = job.launch(2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.output.read_bytes() == undisturbed


def test_run_sh_on_several_hosts_can_be_interrupted(job, undisturbed, tiny_model):
    if reason := why_no_hosts():
        pytest.skip(reason)
    hostfile = job.folder / "hostfile"
    hostfile.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    config = ["config", "--model", tiny_model("olmoe"), "--hostfile", hostfile]
    config += ["--out", job.folder / "config"]
    written = run_command([sys.executable, "-m", "ds_moe_ep", *config])
    assert written.returncode == 0, written.stderr
    # One rank is stopped on its host, and hears of the end from its launcher alone.
    fault = {"FAULT": f"1,batch 2,{_NEW_TOKENS + 3},SIGSTOP", "FAULT_MARK": str(job.mark)}
    binaries = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    env = {"INFER": str(_FAULTY), "PATH": binaries}
    with simulate_hosts(read_hostfile(hostfile), {**fault, "PYTHONPATH": str(REPO)}) as hosts:
        command = hosts.command(["bash", job.folder / "config" / "run.sh", *job.args[2:]])
        for number in (signal.SIGINT, signal.SIGTERM):
            with _started([*command, "--timeout", str(_WAIT_S)], job, env) as process:
                start_s = time.monotonic()
                process.send_signal(number)  # the terminal's would reach this script only, too
                output, _ = process.communicate(timeout=_WAIT_S)
                assert process.returncode == 130, output
                _, alive = psutil.wait_procs(job.processes(), timeout=10 + _BUSY_S)
                assert not alive, output
                assert time.monotonic() - start_s < 10 + _BUSY_S, output
    assert job.finished()
    result = job.launch(2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.output.read_bytes() == undisturbed


def test_an_output_folder_that_goes_is_told(job):
    result = job.launch(2, fault=f"0,batch 2,{_NEW_TOKENS + 2},REMOVE_FOLDER")
    assert result.returncode == 1, result.stdout + result.stderr
    told = r"ResourceError: .*rank-0000\d\.jsonl: cannot be written on \S+ \(No such file or dir"
    assert len(re.findall(told, result.stderr)) == 1, result.stderr
    assert _count_messages(result.stderr) == 1, result.stderr


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a tmpfs (root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_and_what_is_written_stays_valid(job, small_disk, undisturbed):
    job.output = small_disk / "out.jsonl"
    job.partial = small_disk / "out.jsonl.partial"
    job.args += ["--output", job.output]
    result = job.launch(2, fault="0,batch 1,0,FILL_DISK")
    assert result.returncode == 1, result.stdout + result.stderr
    told = r"ResourceError: .* \(No space left on device\)\. Make room"
    assert len(re.findall(told, result.stderr)) == 1, result.stderr
    assert "Traceback" not in result.stderr
    assert not job.output.exists()
    assert job.finished()  # of the rank that took the last page
    (small_disk / "filler").unlink()
    result = job.launch(2)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.output.read_bytes() == undisturbed


def test_a_host_that_is_cut_off_is_named(job):
    if reason := why_no_hosts():
        pytest.skip(reason)
    hostfile = job.folder / "hostfile"
    hostfile.write_text("worker-0 slots=2\nworker-1 slots=2\n")
    variables = {
        "FAULT": f"2,batch,{_NEW_TOKENS + 2},NOTHING",
        "FAULT_MARK": str(job.mark),
        "PYTHONPATH": str(REPO),
        # Or pdsh waits for the host that is not there.
        "PDSH_SSH_ARGS_APPEND": "-oServerAliveInterval=2 -oServerAliveCountMax=3",
    }
    with simulate_hosts(read_hostfile(hostfile), variables) as hosts:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile]
        launcher += ["--launcher", "pdsh", "--master_addr", hosts.addresses["worker-0"]]
        slow = ["--max-new-tokens", "50", "--timeout", str(_TIMEOUT_S)]
        command = hosts.command([*launcher, _FAULTY, *job.args, *slow])
        with _started(command, job) as process:
            hosts.cut_off("worker-1")
            start_s = time.monotonic()
            output, _ = process.communicate(timeout=_WAIT_S)
            took_s = time.monotonic() - start_s
    told = (
        rf"DistributedError: \[rank [01] .* No answer from rank 2 \(\S+\), rank 3 \(\S+\)\.{_KEPT}"
    )
    assert process.returncode > 0, output
    assert len(re.findall(told, output)) == _count_messages(output) == 1, output
    assert took_s < _TIMEOUT_S + 20 + _BUSY_S, output
    assert job.processes() == [], output


def _run_on_skewed_hosts(job: Job, fault: str) -> subprocess.CompletedProcess[str]:
    """Runs a job on two hosts of a rank each, of which the second is an hour ahead."""
    library = next(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"), None)
    if library is None:
        pytest.skip("needs libfaketime. Install: apt-get install -y faketime")
    hostfile = job.folder / "hostfile"
    hostfile.write_text("worker-0 slots=1\nworker-1 slots=1\n")
    variables = {
        "FAULT": fault,
        "FAULT_MARK": str(job.mark),
        "SKEWED": "worker-1",
        "FAKETIME_LIBRARY": str(library),
        "PYTHONPATH": str(REPO),
    }
    with simulate_hosts(read_hostfile(hostfile), variables) as hosts:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile]
        launcher += ["--launcher", "pdsh", "--master_addr", hosts.addresses["worker-0"]]
        script = Path(__file__).with_name("skewed_infer.py")
        command = [*launcher, script, *job.args, "--timeout", str(_TIMEOUT_S)]
        return run_command(hosts.command(command), timeout_s=_WAIT_S)


def test_clocks_of_hosts_need_not_agree(job, undisturbed):
    if reason := why_no_hosts():
        pytest.skip(reason)
    broken = _run_on_skewed_hosts(job, f"1,batch 2,{_NEW_TOKENS + 2},SIGSTOP")
    output = broken.stdout + broken.stderr
    early, ahead = (float((job.folder / f"clock-{rank}").read_text()) for rank in (0, 1))
    assert 3500 < ahead - early < 3700
    assert broken.returncode > 0, output
    told = rf"DistributedError: \[rank 0 .* No answer from rank 1 \(worker-1\)\.{_KEPT}"
    assert len(re.findall(told, output)) == _count_messages(output) == 1, output
    assert job.seconds_since_fault() < _TIMEOUT_S + 20 + _BUSY_S, output
    assert job.processes() == [], output
    whole = _run_on_skewed_hosts(job, "-1,,0,NOTHING")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert job.output.read_bytes() == undisturbed


def test_a_rank_that_is_killed_with_its_supervisor_ends_the_job(job, undisturbed):
    """Nobody is left who could name it: DeepSpeed's launcher shows the signal as its exit code."""
    result = job.launch(4, fault=f"2,batch 2,{_NEW_TOKENS + 2},KILL_BOTH", timeout_s=_WAIT_S)
    output = result.stdout + result.stderr
    assert result.returncode == 256 - signal.SIGKILL, output
    assert "exits with return code = -9" in output
    assert job.seconds_since_fault() < 20 + _BUSY_S, output
    assert job.processes() == [], output
    assert job.finished()
    result = job.launch(2, timeout_s=_WAIT_S)
    assert result.returncode == 0, result.stdout + result.stderr
    assert job.output.read_bytes() == undisturbed


def test_a_port_in_use_is_told_at_once(job):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = job.launch(4, port=port, timeout_s=_WAIT_S)
    assert result.returncode == 1, result.stdout + result.stderr
    told = (
        rf"DistributedError: \[rank 0 \S+\] the 4 ranks did not meet at \S+:{port}: .*--master_port"
    )
    assert re.findall(told, result.stderr), result.stderr
    assert _count_messages(result.stderr) == 1, result.stderr
    assert list(job.output.parent.iterdir()) == []
