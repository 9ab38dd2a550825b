"""Ranks forked from one process: what each is given, and what its launcher gets back."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ds_moe_ep.rehearsal.shared_start import shared_start
from tests.helpers import launch_infer
from tests.helpers.families import save_tiny
from tests.helpers.launch import REPO, free_port

_SCRIPT = """\
import os, signal, sys, time
print(os.environ["LOCAL_RANK"], os.getcwd(), sys.argv[1:], "json.tool" in sys.modules, flush=True)
if sys.argv[1] == "wait":
    signal.signal(signal.SIGTERM, lambda *caught: sys.exit(7))
    with open(f"pid-{os.environ['LOCAL_RANK']}", "w") as file:
        file.write(str(os.getpid()))
    time.sleep(60)
if sys.argv[1] == "die":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def start(tmp_path):
    """Starts two ranks as DeepSpeed's launcher would, with an argument each."""
    (tmp_path / "script.py").write_text(_SCRIPT)
    started = []

    def run(*arguments: str, module: str = "json.tool") -> list[subprocess.Popen]:
        starter, variables = shared_start(tmp_path / "script.py", module)
        port = str(free_port())
        for rank, argument in enumerate(arguments):
            started.append(
                subprocess.Popen(
                    [sys.executable, "-u", starter, argument],
                    env={
                        **os.environ,
                        **variables,
                        "PYTHONPATH": os.pathsep.join((str(REPO), str(tmp_path))),
                        "MASTER_PORT": port,
                        "LOCAL_RANK": str(rank),
                        "LOCAL_SIZE": str(len(arguments)),
                    },
                    cwd=tmp_path,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield run
    for process in started:
        process.kill()


def _wait_for(is_done) -> None:
    for _ in range(600):
        if is_done():
            return
        time.sleep(0.05)
    raise AssertionError("not done in 30 s")


def _rank_pid(folder: Path, rank: int) -> int:
    path = folder / f"pid-{rank}"
    _wait_for(lambda: path.exists() and path.read_text())
    return int(path.read_text())


def test_ranks_are_given_what_their_launcher_gave_and_give_their_exit_codes_back(start, tmp_path):
    first, second = start("0", "5")
    assert first.communicate(timeout=60)[0] == f"0 {tmp_path} ['0'] True\n"
    assert second.communicate(timeout=60)[0] == f"1 {tmp_path} ['5'] True\n"
    assert (first.returncode, second.returncode) == (0, 5)


def test_what_cannot_be_imported_is_told_once(start, tmp_path):
    (tmp_path / "late.py").write_text("import time\ntime.sleep(3)\nimport no_such_module\n")
    (only,) = start("0", module="late")
    told = only.communicate(timeout=60)[1]
    assert only.returncode == 1
    assert told.count("Traceback") == 1, told
    assert told.endswith("ModuleNotFoundError: No module named 'no_such_module'\n")


def test_a_rank_that_a_signal_ended_looks_so(start):
    first, second = start("die", "0")
    assert (first.wait(timeout=60), second.wait(timeout=60)) == (-signal.SIGKILL, 0)


def test_signals_reach_the_rank_and_the_end_of_its_launcher_s_process_too(start, tmp_path):
    first, second = start("wait", "wait")
    pids = _rank_pid(tmp_path, 0), _rank_pid(tmp_path, 1)
    first.terminate()
    second.kill()
    assert first.wait(timeout=60) == 7
    assert second.wait(timeout=60) == -signal.SIGKILL
    for pid in pids:
        _wait_for(lambda pid=pid: not Path(f"/proc/{pid}").exists())


# launch/infer.py, which tells at its end what it has imported.
_TELLING = """\
import sys
from ds_moe_ep.engine.supervisor import Progress
from launch.infer import main
enter = Progress.enter
def tell(self, phase):
    enter(self, phase)
    if phase == "writing the results":
        print("imported:", "prometheus_client" in sys.modules, flush=True)
Progress.enter = tell
sys.exit(main())
"""


@pytest.mark.parametrize("has_port", [False, True])
def test_what_serves_prometheus_is_imported_only_where_it_is_asked_for(tmp_path, has_port):
    save_tiny("olmoe", tmp_path / "model")
    (tmp_path / "in.jsonl").write_text('{"id": "a", "prompt_token_ids": [3, 4]}\n')
    (tmp_path / "telling.py").write_text(_TELLING)
    options = ["--model", tmp_path / "model", "--input", tmp_path / "in.jsonl"]
    options += ["--output", tmp_path / "out.jsonl", "--metrics", tmp_path / "metrics"]
    options += ["--metrics-port", str(free_port())] if has_port else []
    ended = launch_infer(options, num_ranks=1, script=tmp_path / "telling.py", is_forked=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"imported: {has_port}\n" in ended.stdout
