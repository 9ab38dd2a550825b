"""Runs a Hugging Face MoE model with its experts spread over all ranks.

Use: deepspeed launch/infer.py --model M --input in.jsonl --output out.jsonl (--help: the rest)
"""

from __future__ import annotations

import sys

from ds_moe_ep.engine.options import JobOptions, parse_options
from ds_moe_ep.engine.rank import run_rank
from ds_moe_ep.engine.supervisor import Progress


def main() -> int:
    """Runs this rank; returns its exit code."""
    return run_rank(parse_options, work)


def work(options: JobOptions, progress: Progress) -> int:
    """Does this rank's part of the job, in a process that is supervised; returns its exit code."""
    # torch, transformers, deepspeed: seconds, so after the arguments are known to be good.
    from ds_moe_ep.infer_job import run_job

    return run_job(options, progress)


if __name__ == "__main__":
    sys.exit(main())
