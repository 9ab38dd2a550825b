"""Says once why a job broke, in the words of the rank that knows, before this rank ends.

The first rank of a host that ends makes DeepSpeed's launcher end the others there. So the rank that
speaks ends first; the others hold back until they are ended.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ds_moe_ep.dist.groups import Job, RankInfo
from ds_moe_ep.dist.rendezvous import RollCall
from ds_moe_ep.engine.supervisor import Progress, what_is_kept
from ds_moe_ep.errors import DistributedError, DsMoeEpError, ResourceError, some

__all__ = ["fail"]

# Ranks that miss the same other rank find out within a step of each other.
_ANSWER_S = 5.0
# Longer than that, and than a launcher takes to notice that the rank that spoke has ended.
_HOLD_S = 9.0
# The store goes with rank 0: others who have the same to say are to find that it is said.
_LINGER_S = 2.0

_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "monitoredBarrier")
_NO_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


def fail(
    error: Exception, info: RankInfo, job: Job | None, progress: Progress, kept: Path | None
) -> int:
    """Tells the user what broke, if it is for this rank to tell; the process is to end then.

    Args:
        error: What this rank met: the cause, or a consequence of what happened to another rank.
        info: Who this process is.
        job: The job, once this rank has joined it.
        progress: Where this rank is.
        kept: Folder in which finished prompts are kept; None if they are not.

    Returns:
        The exit code.
    """
    known = _explain(error, info, progress)
    roll_call = job.roll_call if job else None
    lost = isinstance(known, DistributedError)
    if job is None or roll_call is None:
        speaks = _speaks_alone(info, lost)
    else:
        speaks, silent = _ask(roll_call, lost)
        if speaks and lost:
            known = DistributedError(f"{known} {_no_answer(silent, job.hosts)}")
    if not speaks:
        time.sleep(_HOLD_S)
        return known.exit_code if known else 1
    if known is None:
        text = f"[{info}] at {progress}: {''.join(traceback.format_exception(error))}"
    else:
        text = f"{type(known).__name__}: {known}"
    if known is None or known.exit_code == 1:
        text += what_is_kept(kept)
    print(text, file=sys.stderr, flush=True)
    if info.rank == 0 and roll_call is not None and not lost:
        roll_call.silent_ranks(_LINGER_S)
    return known.exit_code if known else 1


def _explain(error: Exception, info: RankInfo, progress: Progress) -> DsMoeEpError | None:
    """Returns what the user is told instead of a traceback; None if nobody expected this."""
    text = str(error)
    if isinstance(error, DistributedError) and not text.startswith("[rank "):
        return DistributedError(f"[{info}] at {progress}: {text}")
    if isinstance(error, DsMoeEpError):
        return error
    first_line = text.strip().partition("\n")[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in text for words in _NO_MEMORY
    ):
        detail = first_line.rstrip(".") or type(error).__name__
        return ResourceError(
            f"[{info}] out of memory at {progress}: {detail}. "
            "Lower --batch-size, and --max-new-tokens if there is one, or use more ranks."
        )
    if isinstance(error, dist.DistError) or any(words in text for words in _LOST):
        detail = first_line.rstrip(".")
        return DistributedError(f"[{info}] lost other ranks at {progress}: {detail}.")
    return None


def _ask(roll_call: RollCall, lost: bool) -> tuple[bool, list[int]]:
    """Decides whether this rank speaks, and finds out, if it has lost others, who does not answer.

    Rank 0 may go with the store while it is asked: mostly its launcher has ended it, since somebody
    there has spoken, and ends this one too if it waits.
    """
    is_first = roll_call.answer()
    silent = roll_call.silent_ranks(_ANSWER_S) if is_first and lost else []
    if is_first is None or silent is None:
        return _speaks_for_host(), [0]
    return is_first, silent


def _speaks_alone(info: RankInfo, lost: bool) -> bool:
    """Decides without a store: rank 0 is there, or a rank a host says that ranks are missing."""
    if info.rank == 0:
        return True
    if lost and info.local_rank == 0:
        time.sleep(_ANSWER_S)
        return True
    return False


def _speaks_for_host() -> bool:
    """Decides where rank 0, and the store in it, is what was lost: the first rank on each host.

    The others there find its claim, which lasts until it ends, if they find out within its wait.
    """
    name = f"\0ds_moe_ep {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    claim = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        claim.bind(name)
        claim.detach()  # held until this process ends
        time.sleep(_ANSWER_S)
        return True
    return False


def _no_answer(silent: Sequence[int], hosts: Sequence[str]) -> str:
    if not silent:
        return "All ranks answer now: is --timeout too short for the slowest of them?"
    return f"No answer from {some([f'rank {rank} ({hosts[rank]})' for rank in silent])}."
