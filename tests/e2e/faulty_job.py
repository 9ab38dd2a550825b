"""A job to which something happens: started again and again, looked at, and timed.

What happens is in faulty_infer.py. Nothing here decides what a job must do then.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from tests.helpers import launch_infer, run_command
from tests.helpers.launch import REPO

__all__ = ["BATCH", "FAULTY_INFER", "HOST", "KEPT", "NEW_TOKENS", "WAIT_S", "Job"]
__all__ += ["count_messages", "ended_in_time", "start_and_wait_for_fault", "write_run_sh"]

NEW_TOKENS = 6
FAULTY_INFER = REPO / "tests" / "e2e" / "faulty_infer.py"
WAIT_S = 600.0  # for a job to come to a place, on a machine that is very busy
HOST = re.escape(os.uname().nodename)
BATCH = r"batch \d+ of \d+ \(prompts .*\)"
KEPT = r" Finished prompts are in .*out\.jsonl\.partial: go on with --resume\."
# On top of what operators are promised (docs/operations.md), where tests compete for cores.
_BUSY_S = 10.0


class Job:
    """A job in a folder of its own, started again and again."""

    def __init__(self, model: Path, prompts: Path, folder: Path) -> None:
        self.folder = folder
        self.output = folder / "results" / "out.jsonl"
        self.output.parent.mkdir(parents=True)
        self.mark = folder / "mark"
        self.args = ["--model", model, "--input", prompts]
        self.args += ["--max-new-tokens", str(NEW_TOKENS), "--batch-size", "2", "--resume"]

    @property
    def partial(self) -> Path:
        """Where finished prompts are kept."""
        return self.output.with_name("out.jsonl.partial")

    def words(self, *args: str | Path) -> list[str | Path]:
        """Returns the arguments of launch/infer.py, with others after those of every run."""
        return [*self.args, "--output", self.output, *args]

    def run_undisturbed(self) -> bytes:
        """Runs it on one rank, without a launcher, and returns what it writes."""
        command = [sys.executable, REPO / "launch" / "infer.py", *self.words()]
        env = {"DS_ACCELERATOR": "cpu"}
        result = run_command(command, env=env, timeout_s=WAIT_S, is_forked=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return self.output.read_bytes()

    def launch(self, num_ranks: int, *args: str | Path, fault: str | None = None, **options):
        """Runs it on ranks of this machine; a fault is that of faulty_infer.py.

        Forked (tests/helpers/forks.py) a launch takes seconds less: no process imports the
        libraries, and supervisors and launchers, which as users start them have no torch, share
        them. With ``is_forked=False`` all start as users do.
        """
        if fault is not None:
            self.mark.unlink(missing_ok=True)
            options["env"] = self.fault(fault)
            options["script"] = FAULTY_INFER
        options = {"is_forked": True, "timeout_s": WAIT_S, **options}
        return launch_infer(self.words(*args), num_ranks=num_ranks, **options)

    def fault(self, what: str, folder: Path | None = None) -> dict[str, str]:
        """Returns the variables of a fault; of one in a folder, by default in the output's."""
        where = str(folder or self.output.parent)
        return {"FAULT": what, "FAULT_MARK": str(self.mark), "FAULT_FOLDER": where}

    def check_resumed(self, num_ranks: int, expected: bytes) -> str:
        """Goes on with it, and returns what that says; what it writes is compared."""
        result = self.launch(num_ranks)
        assert result.returncode == 0, result.stdout + result.stderr
        assert self.output.read_bytes() == expected
        return result.stdout

    def resume_and_run_undisturbed(self) -> tuple[bytes, bytes]:
        """Returns what it writes that goes on on 2 ranks, and what an undisturbed run does."""
        result = self.launch(2)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "resuming: " in result.stdout
        written = self.output.read_bytes()
        self.output.unlink()
        return written, self.run_undisturbed()

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


def count_messages(said: str) -> int:
    """Returns how often a job says why it broke."""
    return len(re.findall(r"Traceback|(?:Distributed|Resource)Error: ", said))


def ended_in_time(what: str, took_s: float, bound_s: float) -> bool:
    """Returns whether it did, and shows by how much (pytest -rP)."""
    print(f"{what}: {took_s:.1f} s of {bound_s:.0f} s")
    return took_s < bound_s + _BUSY_S


@contextlib.contextmanager
def start_and_wait_for_fault(
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
        until_s = time.monotonic() + WAIT_S
        while not job.mark.exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < until_s
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def write_run_sh(job: Job, model: Path, hostfile: Path) -> Path:
    """Writes the files of a run, as a user does, and returns the script that starts it."""
    command = ["config", "--model", model, "--hostfile", hostfile, "--out", job.folder / "config"]
    written = run_command([sys.executable, "-m", "ds_moe_ep", *command])
    assert written.returncode == 0, written.stderr
    return job.folder / "config" / "run.sh"
