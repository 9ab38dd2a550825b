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


in_both_ways = pytest.mark.parametrize("is_forked", [False, True], ids=["started", "forked"])


@in_both_ways
def test_output_exit_code_and_environment_come_back(tmp_path, monkeypatch, is_forked):
    monkeypatch.setenv("RANK", "7")
    program = (
        "import os, sys; print(os.getcwd(), os.environ.get('RANK'), os.environ['X'],"
        " os.environ['HF_HUB_OFFLINE'], os.environ['PYTHONPATH'].split(':')[0]);"
        " print('grief', file=sys.stderr); sys.exit(3)"
    )
    command = [sys.executable, "-c", program]
    result = run_command(command, env={"X": "y"}, cwd=tmp_path, is_forked=is_forked)
    assert result.returncode == 3
    assert result.stdout == f"{tmp_path} None y 1 {REPO}\n"
    assert result.stderr == "grief\n"


@in_both_ways
@pytest.mark.parametrize("own_sleep_s", [3600, 0], ids=["command hangs", "its child hangs"])
def test_what_is_not_done_in_time_is_ended_with_all_it_started(own_sleep_s, is_forked):
    program = _STARTS_A_CHILD_AND_SLEEPS.format(own_sleep_s=own_sleep_s)
    with pytest.raises(AssertionError, match="not done after 3 s: ") as error:
        run_command([sys.executable, "-c", program], timeout_s=3, is_forked=is_forked)
    assert _wait_until_gone(_pid_in(str(error.value)))


@in_both_ways
def test_a_quiet_process_left_behind_is_ended(is_forked):
    program = (
        "import subprocess; print(subprocess.Popen(['sleep', '3600'],"
        " stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)"
    )
    result = run_command([sys.executable, "-c", program], is_forked=is_forked)
    assert _wait_until_gone(int(result.stdout))


def test_forks_stand_below_each_other_under_their_own_commands(tmp_path):
    """The second process is a child of the first, and neither has imported torch itself."""
    (tmp_path / "script.py").write_text(
        "import os, subprocess, sys\n"
        "from pathlib import Path\n"
        "assert 'torch' in sys.modules\n"
        "if 'again' not in sys.argv:\n"
        "    sys.exit(subprocess.call([sys.executable, '-u', __file__, 'again']))\n"
        "for pid in (os.getpid(), os.getppid()):\n"
        "    print(Path(f'/proc/{pid}/cmdline').read_bytes().rstrip(b'\\0').split(b'\\0'))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    script = str(tmp_path / "script.py")
    result = run_command([sys.executable, script], is_forked=True)
    inner, outer = ([word.decode() for word in eval(line)] for line in result.stdout.splitlines())
    assert inner == [sys.executable, "-u", script, "again"]
    assert outer == [sys.executable, script]
    assert result.returncode == 256 - 9  # what sys.exit makes of -9
