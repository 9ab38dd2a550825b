"""The two processes of a rank, without torch: small scripts stand for the worker and the launchers.

A script writes its worker's process id to stdout once it works, and gets signals then.
"""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest

from ds_moe_ep.engine.supervisor import Progress
from tests.helpers.launch import REPO

_RANK = """
import os, sys, time
from pathlib import Path
from ds_moe_ep.engine.supervisor import supervise, wake_after

def work(progress):
    progress.enter("batch 2 of 3")
    progress.start_step({step})
    print(os.getpid(), flush=True)
    sys.stdin.readline()
    {work}

name = "rank 0 worker-0" if {is_rank_0} else "rank 3 worker-1"
kept = Path({kept!r})
sys.exit(supervise(
    work, name=name, kept=kept, is_rank_0={is_rank_0}, patience_s={patience_s}
))
"""
_WHERE = "batch 2 of 3, step 17."
_WAIT_S = 60.0  # a bound for machines that are very busy; each of these takes a second or two


def _rank(
    kept: Path, work: str, patience_s: float = 1e9, is_rank_0: bool = False, step: int = 17
) -> str:
    return _RANK.format(
        kept=str(kept), work=work, patience_s=patience_s, is_rank_0=is_rank_0, step=step
    )


def _wait_for(process: psutil.Process, status: str) -> None:
    until_s = time.monotonic() + _WAIT_S
    while process.status() != status:
        assert time.monotonic() < until_s, f"{process} is not {status}"
        time.sleep(0.05)


class Rank:
    """A supervisor and its worker, which does not begin to work before `end`."""

    def __init__(
        self,
        kept: Path,
        work: str = "time.sleep(600)",
        under: tuple[str, ...] = (),
        patience_s: float = 1e9,
        port: int = 0,
        is_rank_0: bool = False,
        step: int = 17,
    ):
        script = _rank(kept, work, patience_s, is_rank_0, step)
        command = [sys.executable, "-c", script]
        for name in reversed(under):  # waits for what it started, not closely, as DeepSpeed's
            code = (
                "import subprocess, sys, time; code = subprocess.call(eval(sys.argv[2]));"
                " time.sleep(2); sys.exit(code)"
            )
            command = [sys.executable, "-c", code, name, repr(command)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(REPO),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            start_new_session=True,
            # Tests in the background or under nohup have them ignored, and so would the rank.
            preexec_fn=lambda: [
                signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)
            ],
        )
        self.worker = psutil.Process(int(self.process.stdout.readline()))
        self.supervisor = self.worker.parent()

    def end(self) -> tuple[int, str]:
        """Lets the worker go on, and waits for the exit code and what was said."""
        _, said = self.process.communicate("go on\n", timeout=_WAIT_S)
        return self.process.returncode, said

    def is_gone(self) -> bool:
        """Waits until neither process is left."""
        _, alive = psutil.wait_procs([self.worker, self.supervisor], timeout=_WAIT_S)
        return not alive


@pytest.fixture
def start(tmp_path):
    """Returns a function that starts a rank; what is left of it at the end of the test is ended."""
    ranks = []

    def start_rank(**options) -> Rank:
        ranks.append(Rank(tmp_path / "out.jsonl.partial", **options))
        return ranks[-1]

    yield start_rank
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, signal.SIGKILL)
        rank.process.communicate()


@pytest.mark.parametrize(("work", "code"), [("return 0", 0), ("return 2", 2), ("return 1", 1)])
def test_the_exit_code_is_the_workers(start, work: str, code: int):
    assert start(work=work).end() == (code, "")


def test_an_exception_ends_the_worker_as_it_ends_any_python(start):
    code, said = start(work="raise LookupError('a bug')").end()
    assert code == 1
    assert said.count("Traceback") == 1
    assert said.endswith("LookupError: a bug\n")


def test_a_killed_worker_is_named_with_its_place(start, tmp_path):
    rank = start()
    rank.worker.kill()
    told = f"DistributedError: [rank 3 worker-1] was ended by SIGKILL at {_WHERE}"
    assert rank.end() == (1, f"{told}\n")
    (tmp_path / "out.jsonl.partial").mkdir()
    rank = start()
    rank.worker.terminate()
    told = told.replace("SIGKILL", "SIGTERM")
    kept = f" Finished prompts are in {tmp_path}/out.jsonl.partial: go on with --resume."
    assert rank.end() == (1, f"{told}{kept}\n")


def test_a_killed_supervisor_is_named_by_its_worker(start):
    rank = start()
    rank.supervisor.kill()
    pid = rank.supervisor.pid
    told = (
        f"DistributedError: [rank 3 worker-1] lost process {pid} at {_WHERE[:-1]}: it was killed."
    )
    assert rank.end() == (-signal.SIGKILL, f"{told}\n")
    assert rank.is_gone()


def test_a_supervisor_killed_under_deepspeed_ends_the_launcher_with_its_own_code(start):
    rank = start(under=("deepspeed.launcher.launch",))
    rank.supervisor.kill()
    assert rank.is_gone()
    code, said = rank.end()
    assert "[rank 3 worker-1] lost process" in said
    assert code == -signal.SIGTERM  # DeepSpeed's launcher makes that exit code 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_told_to_stop(start, number: signal.Signals):
    for to_both in (False, True):
        rank = start(is_rank_0=True)
        if to_both:
            os.killpg(rank.process.pid, number)
        else:
            rank.supervisor.send_signal(number)
        code, said = rank.end()
        assert code == 130
        # SIGTERM is what the launcher sends to the other ranks of a broken job.
        told = "" if number == signal.SIGTERM else f"interrupted ({number.name}) at {_WHERE}\n"
        assert said == told
        assert rank.is_gone()


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    rank = _rank(tmp_path, "time.sleep(1); return 0")
    script = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{rank}"
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        start_new_session=True,
    )
    process.stdout.readline()
    os.killpg(process.pid, signal.SIGHUP)
    process.communicate(timeout=_WAIT_S)
    assert process.returncode == 0


@pytest.mark.parametrize(
    "names", [("deepspeed.launcher.launch",), ("deepspeed", "deepspeed.launcher.launch")]
)
def test_no_rank_outlives_deepspeed(start, names: tuple[str, ...]):
    rank = start(under=names, is_rank_0=True)
    rank.process.kill()  # the outermost
    assert rank.is_gone()
    assert f"interrupted (its launcher has gone) at {_WHERE}" in rank.end()[1]


def test_a_rank_outlives_a_shell(start):
    rank = start(
        under=("bash",), work="time.sleep(2 * 1.0 + 1); print('done', flush=True); return 0"
    )
    rank.process.kill()
    assert "done" in rank.process.communicate("go on\n", timeout=_WAIT_S)[0]


def test_both_are_stopped_and_go_on_together(start):
    rank = start()
    rank.supervisor.suspend()
    _wait_for(rank.worker, psutil.STATUS_STOPPED)
    rank.supervisor.resume()
    _wait_for(rank.worker, psutil.STATUS_SLEEPING)


# Waits for a rank, then ends the other, as DeepSpeed's launcher does. Writes their process ids.
_LAUNCHER = """
import subprocess, sys
start = lambda script, **pipes: subprocess.Popen([sys.executable, "-c", script], **pipes)
ranks = [start(script) for script in eval(sys.argv[2])]
print([rank.pid for rank in ranks], flush=True)
waits_for = int(sys.argv[3])
code = ranks[waits_for].wait()
ranks[1 - waits_for].terminate()
print(code, ranks[1 - waits_for].wait(), flush=True)
"""


@contextlib.contextmanager
def _two_ranks(
    *scripts: str, waits_for: int
) -> Iterator[tuple[subprocess.Popen[str], Sequence[int]]]:
    """Runs two ranks that work, under a launcher; yields that and their process ids."""
    command = [sys.executable, "-c", _LAUNCHER, "deepspeed.launcher.launch", repr(scripts)]
    process = subprocess.Popen(
        [*command, str(waits_for)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPO)},
        start_new_session=True,
    )
    try:
        lines = [process.stdout.readline() for _ in range(3)]
        yield process, next(eval(line) for line in lines if line.startswith("["))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_rank_that_fails_wakes_the_stopped_ones_for_the_launcher(tmp_path):
    scripts = _rank(tmp_path, "return 1"), _rank(tmp_path, "time.sleep(600)")
    with _two_ranks(*scripts, waits_for=0) as (process, pids):
        os.kill(pids[1], signal.SIGSTOP)
        _wait_for(psutil.Process(pids[1]), psutil.STATUS_STOPPED)
        out, _ = process.communicate("fail now\n", timeout=_WAIT_S)
    assert out == "1 130\n"


def test_a_job_that_is_stopped_as_a_whole_goes_on_however_long_it_stood(tmp_path):
    """By Ctrl-Z and `fg`, which send SIGTSTP and SIGCONT to all."""
    scripts = [_rank(tmp_path, "time.sleep(3); return 0", patience_s=2.0, step=0)] * 2
    with _two_ranks(*scripts, waits_for=0) as (process, _):
        os.killpg(process.pid, signal.SIGSTOP)
        time.sleep(6.0)
        os.killpg(process.pid, signal.SIGCONT)
        out, said = process.communicate("go on\n\n", timeout=_WAIT_S)
    assert said == ""
    assert out.startswith("0 ")


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_worker_that_stands_still_ends_with_the_job_and_not_sooner(start, is_stopped: bool):
    with socket.socket() as store:
        store.bind(("127.0.0.1", 0))
        store.listen()
        rank = start(patience_s=2.0, port=store.getsockname()[1])
        if is_stopped:
            rank.worker.suspend()
        store.settimeout(_WAIT_S)
        store.accept()[0].close()  # it has been asked whether there is a job
        time.sleep(2.0)
        assert rank.worker.is_running()
    assert rank.end() == (1, "")
    assert rank.is_gone()


@pytest.mark.parametrize("is_rank_0", [False, True])
def test_a_rank_that_is_stopped_whole_ends_with_the_job(start, is_rank_0: bool):
    """Alone on its host nobody else would end it: the kernel wakes its supervisor for that."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = listener.getsockname()
        work = f"import socket; held = socket.create_connection({where}); wake_after(held)"
        rank = start(
            work=f"{work}; print('held', flush=True); time.sleep(600)", is_rank_0=is_rank_0
        )
        rank.process.stdin.write("go on\n")
        rank.process.stdin.flush()
        assert rank.process.stdout.readline() == "held\n"
        rank.supervisor.suspend()
        _wait_for(rank.worker, psutil.STATUS_STOPPED)
        listener.accept()[0].close()
    assert rank.end() == (1, "")
    assert rank.is_gone()


@pytest.mark.parametrize("is_supervisor_killed", [False, True])
def test_others_hear_from_a_supervisor_whether_it_saw_the_end(start, is_supervisor_killed: bool):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = listener.getsockname()
        work = f"import socket; held = socket.create_connection({where})"
        work += "; progress.share([held.fileno()]); print('held', flush=True); time.sleep(600)"
        rank = start(work=work)
        rank.process.stdin.write("go on\n")
        rank.process.stdin.flush()
        assert rank.process.stdout.readline() == "held\n"
        rank.worker.suspend()
        if is_supervisor_killed:
            rank.supervisor.kill()
        rank.worker.kill()
        other, _ = listener.accept()
        with other:
            other.settimeout(_WAIT_S)
            words = other.recv(2)
            assert words == (b"" if is_supervisor_killed else b"\0")
            assert is_supervisor_killed or other.recv(2) == b""
    rank.end()
    assert rank.is_gone()


def test_a_rank_0_that_is_stopped_does_not_outlast_the_patience_of_the_others(start):
    with socket.socket() as store:  # its own, in whose name the system takes calls
        store.bind(("127.0.0.1", 0))
        store.listen()
        rank = start(patience_s=2.0, port=store.getsockname()[1], is_rank_0=True)
        rank.worker.suspend()
        code, said = rank.end()
    told = rf"\[rank 0 worker-0\] was ended by its supervisor, stopped for \d s, at {_WHERE}"
    assert code == 1 and re.search(told, said), said
    assert rank.is_gone()


def test_a_worker_that_is_stopped_before_its_first_pass_ends_with_its_name(start):
    rank = start(patience_s=2.0, step=0)
    rank.worker.suspend()
    told = "was ended by its supervisor, stopped for 2 s, at batch 2 of 3."
    assert rank.end() == (1, f"DistributedError: [rank 3 worker-1] {told}\n")
    assert rank.is_gone()


def test_a_worker_that_moves_is_not_given_up(start):
    moves = "[(progress.start_step(i), time.sleep(1.0)) for i in range(6)]; return 0"
    rank = start(work=moves, patience_s=2.0)
    assert rank.end() == (0, "")


def test_progress_says_where():
    progress = Progress("the start")
    assert str(progress) == "the start"
    progress.enter("batch 1 of 2 (prompts 'a', 'caf\u00e9')")
    progress.start_step(3)
    assert str(progress) == "batch 1 of 2 (prompts 'a', 'caf\u00e9'), step 3"
    progress.enter("x" * 10_000)
    assert len(str(progress)) < 5_000
