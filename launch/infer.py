"""Runs a Hugging Face MoE model with its experts spread over all ranks.

Use: deepspeed launch/infer.py --model M --input in.jsonl --output out.jsonl (--help: the rest)
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time

from ds_moe_ep.engine.options import JobOptions, parse_options
from ds_moe_ep.engine.supervisor import Progress, supervise

# Longer than other ranks need, after --timeout, to find out who does not answer and to say so.
_SAID_S = 10.0
# Another rank's message comes first: the first that ends makes DeepSpeed's launcher end the rest.
_RANK_0_SPEAKS_S = 5.0


def main() -> int:
    """Runs this rank; returns its exit code."""
    rank = int(os.environ.get("RANK", "0"))
    options = _parse(rank)
    # A rank alone keeps nobody waiting.
    said_s = _SAID_S if int(os.environ.get("WORLD_SIZE", "1")) > 1 else math.inf
    return supervise(
        lambda progress: work(options, progress),
        name=f"rank {rank} {os.uname().nodename}",
        speaks=rank == 0,
        kept=options.journal_folder,
        start_patience_s=options.start_timeout_s + said_s,
        patience_s=options.timeout_s + said_s,
    )


def work(options: JobOptions, progress: Progress) -> int:
    """Does this rank's part of the job, in a process that is supervised; returns its exit code."""
    # torch's C++ tells of each broken connection on every rank, with its stack.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # torch, transformers, deepspeed: seconds, so after the arguments are known to be good.
    from ds_moe_ep.engine.job import run_job

    return run_job(options, progress)


def _parse(rank: int) -> JobOptions:
    """Parses the arguments on every rank; only rank 0 shows what argparse has to say."""
    if rank == 0:
        return parse_options()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                return parse_options()
        except SystemExit:
            time.sleep(_RANK_0_SPEAKS_S)
            raise


if __name__ == "__main__":
    sys.exit(main())
