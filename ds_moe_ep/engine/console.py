"""What a user sees of a job of many ranks: rank 0 talks, the others only when something breaks."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

__all__ = [
    "byte_progress_bar",
    "only_rank_0_prints",
    "progress_bar",
    "quiet_libraries",
]


def quiet_libraries() -> None:
    """Keeps the libraries' remarks and progress bars off the terminal; their errors stay."""
    import transformers  # seconds; what else is here costs nothing

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)


@contextlib.contextmanager
def only_rank_0_prints(rank: int) -> Iterator[None]:
    """Drops what other ranks print to stdout: DeepSpeed's set-up prints on every rank."""
    if rank == 0:
        yield
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[int], None] | None]:
    """Shows finished prompts while it is open, on a terminal only.

    Yields:
        A function to call with the number of prompts finished so far; None if nothing is shown.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield None
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("prompts"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda finished: bar.update(task, completed=finished)


@contextlib.contextmanager
def byte_progress_bar(total_bytes: int) -> Iterator[Callable[[float], None]]:
    """Shows bytes, bytes a second and the time that is left while it is open, on a terminal only.

    Yields:
        A function to call with the number of bytes done since its last call.
    """
    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)
