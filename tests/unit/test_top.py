"""`ds-moe-ep top`, seen through a terminal of its own: keys, a growing file, and its ends."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time

import pytest

from ds_moe_ep.monitor.live import LiveRun
from tests.helpers import run_command
from tests.helpers.launch import REPO
from tests.helpers.metrics import large_metrics, small_metrics, write_metrics_folder

_TOP = [sys.executable, "-m", "ds_moe_ep", "top"]
_PATIENCE_S = 60.0


def _running(folder, files, num_samples=4):
    """Writes what a job that runs has written so far."""
    samples = files["samples.jsonl"][:num_samples]
    return write_metrics_folder(folder, {"run.json": files["run.json"], "samples.jsonl": samples})


class _Terminal:
    """A command in a terminal of 24 lines, and what it shows."""

    def __init__(self, command, lines=24, columns=110):
        self._here, there = pty.openpty()
        self.settings = termios.tcgetattr(there)
        env = {**os.environ, "TERM": "xterm", "LINES": str(lines), "COLUMNS": str(columns)}
        env["PYTHONPATH"] = str(REPO)
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, env=env, start_new_session=True,
            preexec_fn=lambda: _control(there),
        )  # fmt: skip
        self._there = there
        self._shown = ""

    def wait_for(self, text):
        """Waits until a text is shown, and forgets what was shown up to it."""
        deadline = time.monotonic() + _PATIENCE_S
        while text not in self._shown:
            is_hung = time.monotonic() > deadline or self.process.poll() is not None
            self._read(0.2)
            assert text in self._shown or not is_hung, f"no {text!r} in {self._shown[-2000:]!r}"
        self._shown = self._shown.partition(text)[2]

    def press(self, keys):
        os.write(self._here, keys.encode())

    def end(self):
        """Waits for the command; returns its exit code, the last it showed, and the settings."""
        deadline = time.monotonic() + _PATIENCE_S
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self._shown[-2000:]
            self._read(0.2)
        self._read(0.2)
        return self.process.returncode, self._shown, termios.tcgetattr(self._there)

    def close(self):
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._here)
        os.close(self._there)

    def _read(self, seconds):
        while select.select([self._here], [], [], seconds)[0]:
            new = os.read(self._here, 1 << 16).decode(errors="replace")
            self._shown += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", new)
            seconds = 0


def _control(terminal):
    import fcntl

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)  # so that Ctrl-C there interrupts the command
    # Tests that run in the background of a shell have it ignored, and so would the command.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.fixture
def start():
    terminals = []

    def start(folder, **size):
        terminals.append(_Terminal([*_TOP, str(folder)], **size))
        return terminals[-1]

    yield start
    for terminal in terminals:
        terminal.close()


def test_it_follows_a_job_until_q(tmp_path, start):
    files = small_metrics()
    folder = _running(tmp_path, files)
    terminal = start(folder)
    terminal.wait_for("q quit")
    for rank in range(4):
        terminal.wait_for(f"{rank} node-{'ab'[rank // 2]}")
    lines = [json.dumps(sample) + "\n" for sample in files["samples.jsonl"]]
    with (folder / "samples.jsonl").open("a") as file:
        file.write("".join(lines[4:36]) + lines[36][:30])  # seconds 2 to 9, and a cut line
        file.flush()
        terminal.wait_for("batch 2 of 3")
        file.write(lines[36][30:])
        file.flush()
        terminal.wait_for("batch 3 of 3")
    terminal.press("h")
    terminal.wait_for("node-a (2)")
    terminal.press("r")
    terminal.wait_for("3 node-b")
    terminal.press("q")
    code, shown, settings = terminal.end()
    assert code == 0
    assert settings == terminal.settings
    # The last it shows stays: each rank makes 8 tokens a second.
    assert re.search(r"all .* 32\.0 ", shown)
    assert "Traceback" not in shown


def test_ctrl_c_ends_it_like_q(tmp_path, start):
    terminal = start(_running(tmp_path, small_metrics()))
    terminal.wait_for("q quit")
    terminal.press("\x03")
    code, shown, settings = terminal.end()
    assert (code, settings) == (0, terminal.settings)
    assert "Traceback" not in shown


def test_sigterm_leaves_the_terminal_as_it_was(tmp_path, start):
    terminal = start(_running(tmp_path, small_metrics()))
    terminal.wait_for("q quit")
    terminal.process.send_signal(signal.SIGTERM)
    code, _, settings = terminal.end()
    assert (code, settings) == (143, terminal.settings)


def test_it_ends_with_the_job_and_says_how_to_go_on(tmp_path, start):
    files = small_metrics()
    folder = _running(tmp_path, files)
    terminal = start(folder)
    terminal.wait_for("q quit")
    write_metrics_folder(folder, {"metrics.jsonl": files["metrics.jsonl"]})
    code, shown, settings = terminal.end()
    assert (code, settings) == (0, terminal.settings)
    assert f"ds-moe-ep report {folder}" in shown.replace("\r\n", "")


def test_a_job_is_over_in_a_copy_of_its_folder_too(tmp_path):
    files = small_metrics()
    job = LiveRun(_running(tmp_path, files))
    assert not job.is_over
    write_metrics_folder(tmp_path, {"metrics.jsonl": files["metrics.jsonl"]})
    later = (tmp_path / "metrics.jsonl").stat().st_mtime + 60.0
    os.utime(tmp_path / "run.json", (later, later))  # a copy is made in any order
    assert job.is_over


def test_64_ranks_fit_by_host_and_scroll_by_rank(tmp_path, start):
    terminal = start(_running(tmp_path, large_metrics(), num_samples=640))
    terminal.wait_for("host (ranks)")
    terminal.wait_for("worker-7 (8)")
    terminal.wait_for("q quit")
    terminal.press("r")
    terminal.wait_for("17 worker-2")  # 24 lines, 6 of them for other things
    terminal.wait_for("1 to 18 of 64")
    terminal.press(" ")
    terminal.wait_for("18 worker-2")
    terminal.wait_for("19 to 36 of 64")
    terminal.press("\x1b[A")
    terminal.wait_for("18 to 35 of 64")
    terminal.press("   ")
    terminal.wait_for("63 worker-7")
    terminal.wait_for("47 to 64 of 64")
    terminal.press("q")
    assert terminal.end()[0] == 0


def test_a_damaged_line_ends_it_with_one_message(tmp_path, start):
    folder = _running(tmp_path, small_metrics())
    terminal = start(folder)
    terminal.wait_for("q quit")
    with (folder / "samples.jsonl").open("a") as file:
        file.write("{}\n")
    code, shown, settings = terminal.end()
    assert (code, settings) == (2, terminal.settings)
    assert "ConfigError: " in shown
    assert "samples.jsonl:5: " in shown.replace("\r\n", "")


def test_without_a_terminal_it_shows_the_job_once(tmp_path):
    folder = _running(tmp_path, small_metrics(), num_samples=40)
    result = run_command([*_TOP, folder])
    assert (result.returncode, result.stderr) == (0, "")
    heading, balance, titles, *rows = result.stdout.splitlines()
    assert balance == "balance -"
    assert heading == "models/tiny & <b>  EP4 TP1 PP1 DP1  cpu  10.0 s"
    names = "rank host util memory tokens/s done queue batch step collective at"
    assert titles.split() == names.split()
    assert rows[3].split() == "3 node-b 80% 103 MiB 8.00 2 0 2 40 1.50 ms batch 3 of 3".split()
    # Of all: (3 * 20 + 12) ms a second by 4 * 8 collectives.
    assert rows[4].split() == "all 65% 103 MiB 32.0 8 0 2 40 2.25 ms".split()
    assert len(rows) == 5


def test_before_the_first_batch_and_without_a_job(tmp_path):
    folder = write_metrics_folder(tmp_path / "new", {"run.json": small_metrics()["run.json"]})
    result = run_command([*_TOP, folder])
    assert result.returncode == 0
    assert "the first batch has not begun" in result.stdout
    result = run_command([*_TOP, tmp_path])
    assert (result.returncode, result.stdout) == (2, "")
    assert f"{tmp_path} has no run.json: no job has begun there. Start it first" in result.stderr


def test_tokens_a_second_are_those_of_the_last_seconds(tmp_path):
    files = small_metrics()
    for sample in files["samples.jsonl"]:  # nothing for 20 s, then 5 tokens a second and rank
        sample["t_s"] = float(sample["t_s"]) + (20.0 if sample["t_s"] > 1 else 0.0)
        sample["new_tokens"] = int(max(0.0, 5 * (sample["t_s"] - 21)))
    live = LiveRun(_running(tmp_path, files, num_samples=40))
    live.update()
    # The last 10 s before 30 s begin between the samples of 1 s and 22 s; the earlier one counts.
    assert live.total().tokens_per_s == pytest.approx(4 * (5 * 9) / (30 - 1))


def test_balance_is_that_of_the_last_passes_of_a_file_that_grows_and_is_replaced(tmp_path, start):
    files = small_metrics()
    folder = _running(tmp_path, files)
    terminal = start(folder)
    terminal.wait_for("balance -")
    first, second = (json.dumps(window) + "\n" for window in files["balance.jsonl"])
    with (folder / "balance.jsonl").open("w") as file:
        file.write(first + second[:20])
        file.flush()
        terminal.wait_for("balance 0.60   worst layer 0.40 (3)   passes 1 to 10")
        file.write(second[20:])
    terminal.wait_for("balance 0.80   worst layer 0.60 (3)   passes 11 to 40")
    terminal.press("q")
    assert terminal.end()[0] == 0
    live = LiveRun(folder)
    live.update()
    new = folder / "new.jsonl"
    new.write_text(first * 3)  # longer than the other: that it is another file is all that tells
    new.replace(folder / "balance.jsonl")
    live.update()
    assert live.balance is not None and live.balance.last_step == 10
