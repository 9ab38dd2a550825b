"""Runs whole commands as a user runs them, each in a session of its own and with a time limit.

It owns the processes of the commands it starts. Functions run on ranks are in ranks.py.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.helpers.forks import ForkedCommand

__all__ = ["REPO", "free_port", "launch_infer", "run_command"]

REPO = Path(__file__).resolve().parents[2]
_INFER = REPO / "launch" / "infer.py"

# What a launcher around the tests may have set and must not reach the job under test.
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_OUTPUT_TAIL_CHARS = 8000
_TERMINATE_S = 10.0


def launch_infer(
    args: Sequence[str | Path],
    *,
    num_ranks: int,
    env: Mapping[str, str] | None = None,
    extensions_dir: Path | None = None,
    script: Path = _INFER,
    port: int | None = None,
    timeout_s: float = 300.0,
    is_forked: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs `deepspeed --num_gpus N launch/infer.py ARGS` on the CPU and waits for its end.

    Args:
        args: Arguments of launch/infer.py.
        num_ranks: Number of processes on this machine.
        env: Variables to set on top of the test's own, stronger than the defaults here.
        extensions_dir: Where torch keeps extensions built just in time; default: the user's cache.
        script: What to run in place of launch/infer.py.
        port: Where the ranks meet; default: one that is free.
        timeout_s: Seconds until the job counts as hung.
        is_forked: See `run_command`.

    Returns:
        Exit code, stdout and stderr of the launcher, with those of all ranks in them.

    Raises:
        AssertionError: See `run_command`.
    """
    job_env = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **(env or {})}
    if extensions_dir is not None:
        job_env["TORCH_EXTENSIONS_DIR"] = str(extensions_dir)
    # The module is what the `deepspeed` command calls; it is found where that is not on the PATH.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner"]
    options = [f"--num_gpus={num_ranks}", f"--master_port={port or free_port()}"]
    command = [*launcher, *options, script, *args]
    return run_command(command, env=job_env, timeout_s=timeout_s, is_forked=is_forked)


def run_command(
    argv: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60.0,
    is_forked: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs a command offline, with this checkout importable, and waits for all its processes.

    Args:
        argv: The command.
        env: Variables to set on top of the test's own.
        cwd: Folder to run it in; default: the test's own.
        timeout_s: Seconds until it counts as hung.
        is_forked: Whether Python processes are forks of one that has imported the libraries: for
            tests of what a job does, not of how it starts. See forks.py.

    Returns:
        Exit code, stdout and stderr.

    Raises:
        AssertionError: The command, or a process it left behind with its output still open, was
            not done in time. The message holds the end of the output.
    """
    command = [str(part) for part in argv]
    start = ForkedCommand if is_forked else subprocess.Popen
    process = start(
        command,
        env=_environment(env or {}),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # the group that is ended below
    )
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        stdout, stderr = _terminate(process)
        raise AssertionError(
            f"not done after {timeout_s:g} s: {' '.join(command)}\n"
            f"stdout ends with:\n{stdout[-_OUTPUT_TAIL_CHARS:]}\n"
            f"stderr ends with:\n{stderr[-_OUTPUT_TAIL_CHARS:]}"
        ) from None
    finally:
        _signal_group(process, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _environment(changes: Mapping[str, str]) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
    env["HF_HUB_OFFLINE"] = "1"
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), env.get("PYTHONPATH")]))
    return {**env, **changes}


def _terminate(process: subprocess.Popen[str]) -> tuple[str, str]:
    """Ends a command and all it started, politely first, and returns what it had printed."""
    _signal_group(process, signal.SIGTERM)
    try:
        return process.communicate(timeout=_TERMINATE_S)
    except subprocess.TimeoutExpired:
        _signal_group(process, signal.SIGKILL)
        return process.communicate(timeout=_TERMINATE_S)


def _signal_group(process: subprocess.Popen[str], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def free_port() -> int:
    """Returns a port that is free, and not one that the system hands out to others meanwhile.

    Seconds pass until a job listens on it, and other jobs open connections all the time.
    """
    for port in random.sample(range(10_000, 20_000), k=100):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port
    raise AssertionError("none of 100 ports is free")
