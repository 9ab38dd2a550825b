"""Runs one function on several ranks of a process group and brings back what each rank did.

It owns the processes it starts and ends all of them. Running whole commands is in launch.py.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

__all__ = ["run_ranks"]

# Once a rank has failed, the others get this long to fail as well and say where they were.
_GRACE_S = 5.0


@dataclass(frozen=True)
class _Report:
    """What a rank leaves behind: a return value or a traceback, and when."""

    value: Any
    traceback: str | None
    time_s: float


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    tmp_path: Path,
    *args: Any,
    timeout_s: float = 120.0,
) -> list[Any]:
    """Runs `fn(rank, world_size, *args)` on every rank of a gloo process group.

    Every rank is a new process with one thread, `DS_ACCELERATOR=cpu` and `torch.distributed`
    initialised, forked from one that has imported the libraries.

    Args:
        fn: A function of a module's top level.
        world_size: Number of ranks.
        tmp_path: The test's folder; it may serve several calls.
        *args: Passed on to every rank, pickled.
        timeout_s: Seconds for everything, the start of the processes included.

    Returns:
        What each rank returned (pickled), by rank.

    Raises:
        AssertionError: A rank raised, died or was not done in time. The message holds the
            traceback of every rank that has one, the first to fail first, and the stacks of the
            ranks that were still running.
    """
    run_dir = Path(tempfile.mkdtemp(prefix="ranks-", dir=tmp_path))
    # Pickled here and not by multiprocessing: tensors go by value, and a rank sets its
    # environment before it imports the test's module.
    call = pickle.dumps((fn, args))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.imported_once"])
    ranks: list[BaseProcess] = [
        context.Process(
            target=_rank_main,
            args=(rank, world_size, run_dir, call, timeout_s),
            name=f"rank {rank}",
            daemon=True,
        )
        for rank in range(world_size)
    ]
    try:
        for process in ranks:
            process.start()
        running = _wait(ranks, time.monotonic() + timeout_s)
        for process in running:
            _signal(process, signal.SIGUSR1)  # faulthandler writes its stacks
        if running:
            time.sleep(0.5)
    finally:
        for process in ranks:
            _signal(process, signal.SIGKILL)
            if process.pid is not None:
                process.join()
    reports = [_read_report(run_dir, rank) for rank in range(world_size)]
    if problem := _problem(ranks, running, reports, run_dir, timeout_s):
        raise AssertionError(problem)
    return [report.value for report in reports if report is not None]


def _wait(ranks: list[BaseProcess], deadline_s: float) -> list[BaseProcess]:
    """Waits for all ranks; returns those still running at the deadline or after a failure."""
    running = list(ranks)
    while running:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        wait([process.sentinel for process in running], timeout=left_s)
        # Asked once: a rank may end between two looks, and its failure must not fall between them.
        exit_codes = {process: process.exitcode for process in running}
        if any(exit_codes.values()):
            deadline_s = min(deadline_s, time.monotonic() + _GRACE_S)
        running = [process for process, code in exit_codes.items() if code is None]
    return running


def _signal(process: BaseProcess, number: signal.Signals) -> None:
    if process.pid is not None and process.is_alive():
        os.kill(process.pid, number)


def _read_report(run_dir: Path, rank: int) -> _Report | None:
    path = run_dir / f"report-{rank}"
    return pickle.loads(path.read_bytes()) if path.exists() else None


def _read_stacks(run_dir: Path, rank: int) -> str:
    path = run_dir / f"stacks-{rank}"
    return path.read_text(errors="replace") if path.exists() else "(still starting)"


def _problem(
    ranks: list[BaseProcess],
    running: list[BaseProcess],
    reports: list[_Report | None],
    run_dir: Path,
    timeout_s: float,
) -> str:
    """Returns what went wrong on which rank, or an empty string."""
    raised = [(r.time_s, rank, r.traceback) for rank, r in enumerate(reports) if r and r.traceback]
    parts = [f"[rank {rank}] raised:\n{text}" for _, rank, text in sorted(raised)]
    for rank, process in enumerate(ranks):
        if process in running:
            stacks = _read_stacks(run_dir, rank)
            when = "after another rank had failed" if raised else f"after {timeout_s:g} s"
            parts.append(f"[rank {rank}] was still running {when}:\n{stacks}")
        elif reports[rank] is None:
            parts.append(f"[rank {rank}] died without a report (exit code {process.exitcode})")
    return "\n".join(parts)


def _rank_main(rank: int, world_size: int, run_dir: Path, call: bytes, timeout_s: float) -> None:
    """The whole life of one rank's process."""
    stacks = (run_dir / f"stacks-{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    # What DeepSpeed's launcher would set; the rendezvous itself is a file.
    os.environ.update(
        DS_ACCELERATOR="cpu",
        OMP_NUM_THREADS="1",
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",
        GLOO_SOCKET_IFNAME="lo",  # no look-up of the host's name
    )
    try:
        value = _call_in_group(rank, world_size, run_dir, call, timeout_s)
        _write_report(run_dir, rank, _Report(value, None, time.time()))
    except BaseException:
        _write_report(run_dir, rank, _Report(None, traceback.format_exc(), time.time()))
        os._exit(1)  # no clean-up that could wait for other ranks


def _call_in_group(rank: int, world_size: int, run_dir: Path, call: bytes, timeout_s: float) -> Any:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{run_dir}/rendezvous",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    fn, args = pickle.loads(call)
    value = fn(rank, world_size, *args)
    if dist.is_initialized():  # `fn` may have ended it
        dist.destroy_process_group()
    return value


def _write_report(run_dir: Path, rank: int, report: _Report) -> None:
    """Writes the report in one step: a reader sees all of it or none."""
    part = run_dir / f"report-{rank}.part"
    part.write_bytes(pickle.dumps(report))
    part.rename(run_dir / f"report-{rank}")
