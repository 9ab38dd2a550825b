"""Work under a guard: whatever ends it, or who wants it, no process and no file of it is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.helpers.launch import REPO

# The work starts what outlives its parent, in a session of its own, and heeds no signal.
_WORK = """\
import os, signal, subprocess, sys, time
from ds_moe_ep.rehearsal.guard import go_on_guarded
signal.signal(signal.SIGTERM, lambda caught, frame: sys.exit(128 + caught))
folder = go_on_guarded("guarded-")
(folder / "file").write_text("something")
subprocess.run(["sh", "-c", "trap '' HUP INT TERM; setsid sleep 600 > /dev/null & echo $!"])
print(folder, os.getpid(), flush=True)
if sys.argv[1:]:
    sys.exit(sys.argv[1])
time.sleep(600)
"""


@pytest.fixture
def start(tmp_path):
    """Starts the work and returns its first process, all others, and its folder."""
    started = []

    def run(*arguments: str) -> tuple[subprocess.Popen, list[psutil.Process], Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", _WORK, *arguments],
            cwd=REPO,
            env={**os.environ, "TMPDIR": str(tmp_path)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # As a terminal starts it, however these tests were started.
            preexec_fn=lambda: [
                signal.signal(each, signal.SIG_DFL) for each in (signal.SIGINT, signal.SIGHUP)
            ],
        )
        started.append(process)
        sleeper = psutil.Process(int(process.stdout.readline()))
        name, worker = process.stdout.readline().split()
        folder, others = Path(name), [sleeper]
        assert folder.parent == tmp_path
        if not arguments:
            assert (folder / "file").exists()
            (guard,) = psutil.Process(process.pid).children()
            others += [guard, psutil.Process(int(worker))]
        return process, others, folder

    yield run
    for process in started:
        process.kill()


def _assert_nothing_is_left(processes: list[psutil.Process], folder: Path) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    until_s = time.monotonic() + 30  # the guard removes the folder at its very end
    while folder.exists():
        assert time.monotonic() < until_s, list(folder.iterdir())
        time.sleep(0.05)


def test_work_that_ends_gives_its_exit_code_and_leaves_nothing(start):
    process, others, folder = start("what went wrong")
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == "what went wrong\n"
    _assert_nothing_is_left(others, folder)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGKILL, -signal.SIGKILL),
        (signal.SIGTERM, 128 + signal.SIGTERM),
        (signal.SIGINT, -signal.SIGINT),  # as Python ends by a Ctrl-C that nobody catches
        (signal.SIGHUP, -signal.SIGHUP),
    ],
)
def test_who_wants_it_ends_and_nothing_is_left(start, number, code):
    process, others, folder = start()
    process.send_signal(number)
    assert process.wait(timeout=30) == code
    _assert_nothing_is_left(others, folder)


def test_where_work_cannot_be_watched_none_is_started(tmp_path):
    before = "import os\ndef refuse(pid):\n    raise OSError('no pidfd')\nos.pidfd_open = refuse\n"
    ended = subprocess.run(
        [sys.executable, "-c", before + _WORK, "started"],
        cwd=REPO,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.endswith("OSError: no pidfd\n")
    assert not list(tmp_path.iterdir())


def test_work_that_is_killed_is_told_and_nothing_is_left(start):
    process, others, folder = start()
    *_, worker = others
    worker.kill()
    assert process.wait(timeout=30) == 1
    assert process.stderr.read() == "DistributedError: ended by SIGKILL; nothing is left.\n"
    _assert_nothing_is_left(others, folder)
