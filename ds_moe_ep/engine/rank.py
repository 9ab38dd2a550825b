"""The life of one rank of a launched command: its arguments, its supervisor, its worker.

What the worker does is the command's own part; this module imports no torch.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from ds_moe_ep.dist.rank_info import read_rank_info
from ds_moe_ep.engine.supervisor import Progress, supervise
from ds_moe_ep.errors import ConfigError

__all__ = ["RankOptions", "run_rank"]

# Longer than other ranks need, after --timeout, to find out who does not answer and to say so.
_SAID_S = 10.0
# Another rank's message comes first: the first that ends makes DeepSpeed's launcher end the rest.
_RANK_0_SPEAKS_S = 5.0


class RankOptions(Protocol):
    """What a command's options have to say for its ranks to be supervised."""

    @property
    def journal_folder(self) -> Path | None:
        """Where finished prompts are kept until the output is written; None if they are not."""

    @property
    def timeout_s(self) -> float:
        """For how long any rank waits for another."""

    @property
    def start_timeout_s(self) -> float:
        """For how long ranks may take to come up, and to load."""


Options = TypeVar("Options", bound=RankOptions)


def run_rank(parse: Callable[[], Options], work: Callable[[Options, Progress], int]) -> int:
    """Runs this rank of a command.

    Args:
        parse: Parses the arguments, and ends the process if they make no sense.
        work: Does this rank's part of the job, in a process that is supervised; returns its exit
            code.

    Returns:
        The exit code.
    """
    try:
        info = read_rank_info()
    except ConfigError as error:
        print(f"ConfigError: {error}", file=sys.stderr)
        return error.exit_code
    options = _parse(info.rank, parse)
    # A rank alone keeps nobody waiting.
    said_s = _SAID_S if info.world_size > 1 else math.inf

    def quietly(progress: Progress) -> int:
        # torch's C++ tells of each broken connection on every rank, with its stack.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        return work(options, progress)

    return supervise(
        quietly,
        name=str(info),
        is_rank_0=info.rank == 0,
        kept=options.journal_folder,
        start_patience_s=options.start_timeout_s + said_s,
        patience_s=options.timeout_s + said_s,
    )


def _parse(rank: int, parse: Callable[[], Options]) -> Options:
    """Parses the arguments on every rank; only rank 0 shows what argparse has to say."""
    if rank == 0:
        return parse()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                return parse()
        except SystemExit:
            time.sleep(_RANK_0_SPEAKS_S)
            raise
