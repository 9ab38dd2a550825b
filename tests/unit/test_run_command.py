"""The helper that runs commands: output and exit code come back, and nothing outlives its limit."""

import sys
import time

import pytest

from tests.helpers import run_command
from tests.helpers.launch import REPO

_STARTS_A_CHILD_AND_SLEEPS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
print(child.pid, flush=True)
time.sleep({own_sleep_s})
"""


def _pid_in(message):
    return int(message.split("stdout ends with:\n")[1].split()[0])


def _is_running(pid):
    try:
        state = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until_gone(pid):
    deadline_s = time.monotonic() + 10
    while _is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not _is_running(pid)


def test_output_exit_code_and_environment_come_back(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "7")
    program = (
        "import os, sys; print(os.getcwd(), os.environ.get('RANK'), os.environ['X'],"
        " os.environ['HF_HUB_OFFLINE'], os.environ['PYTHONPATH'].split(':')[0]);"
        " print('grief', file=sys.stderr); sys.exit(3)"
    )
    result = run_command([sys.executable, "-c", program], env={"X": "y"}, cwd=tmp_path)
    assert result.returncode == 3
    assert result.stdout == f"{tmp_path} None y 1 {REPO}\n"
    assert result.stderr == "grief\n"


@pytest.mark.parametrize("own_sleep_s", [3600, 0], ids=["command hangs", "its child hangs"])
def test_what_is_not_done_in_time_is_ended_with_all_it_started(own_sleep_s):
    program = _STARTS_A_CHILD_AND_SLEEPS.format(own_sleep_s=own_sleep_s)
    with pytest.raises(AssertionError, match="not done after 3 s: ") as error:
        run_command([sys.executable, "-c", program], timeout_s=3)
    assert _wait_until_gone(_pid_in(str(error.value)))


def test_a_quiet_process_left_behind_is_ended():
    program = (
        "import subprocess; print(subprocess.Popen(['sleep', '3600'],"
        " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    result = run_command([sys.executable, "-c", program])
    assert _wait_until_gone(int(result.stdout))
