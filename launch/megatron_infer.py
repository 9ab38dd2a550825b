"""Scores prompts with a converted checkpoint in Megatron's own GPTModel.

Use: deepspeed launch/megatron_infer.py --args megatron.args --load DIR --input in.jsonl
--output out.jsonl (--help: the rest)
"""

from __future__ import annotations

import sys

from ds_moe_ep.engine.rank import run_rank
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.megatron.options import MegatronJobOptions, parse_megatron_options


def main() -> int:
    """Runs this rank; returns its exit code."""
    return run_rank(parse_megatron_options, work)


def work(options: MegatronJobOptions, progress: Progress) -> int:
    """Does this rank's part of the job, in a process that is supervised; returns its exit code."""
    # torch, transformers, deepspeed: seconds, so after the arguments are known to be good.
    from ds_moe_ep.megatron.job import run_megatron_job

    return run_megatron_job(options, progress)


if __name__ == "__main__":
    sys.exit(main())
