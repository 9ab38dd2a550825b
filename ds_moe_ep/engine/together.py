"""What ranks of any command do around their work: they meet, and tell once why they broke."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from ds_moe_ep.dist.groups import Job, init_distributed, read_rank_info
from ds_moe_ep.engine.console import only_rank_0_prints, quiet_libraries
from ds_moe_ep.engine.failure import fail
from ds_moe_ep.engine.heartbeat import heartbeat
from ds_moe_ep.engine.rank import RankOptions
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.local_machine import threads_of_rank

__all__ = ["run_together"]


def run_together(
    work: Callable[[Job], None], options: RankOptions, progress: Progress, kept: Path | None
) -> int:
    """Meets the other ranks, does this rank's work, and leaves.

    Args:
        work: What this rank does in the job.
        options: The bounds of all waits.
        progress: Told where this rank is.
        kept: Folder in which finished prompts are kept; None if they are not.

    Returns:
        The exit code. By one rank it was told why the job broke.
    """
    info = read_rank_info()
    quiet_libraries()
    # The libraries are here to stay: looking through them for garbage took a third of loading.
    gc.freeze()
    job = None
    try:
        progress.enter("meeting the other ranks")
        with only_rank_0_prints(info.rank):
            job = init_distributed(
                info, timeout_s=options.timeout_s, start_timeout_s=options.start_timeout_s
            )
        num_threads = threads_of_rank(job.nodes.count(job.nodes[info.rank]))
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        with heartbeat(
            job,
            progress,
            options.timeout_s,
            lambda error, own: fail(error, info, own, progress, kept),
        ):
            work(job)
    except Exception as error:
        return fail(error, info, job, progress, kept)
    dist.destroy_process_group()
    return 0
