"""Runs a Hugging Face MoE model with its experts spread over all ranks.

Use: deepspeed launch/infer.py --model M --input in.jsonl --output out.jsonl (--help: the rest)
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

from ds_moe_ep.engine.console import let_rank_0_speak
from ds_moe_ep.engine.options import JobOptions, parse_options


def main() -> int:
    """Runs this rank; returns its exit code."""
    options = _parse()
    # torch, transformers, deepspeed: seconds, so after the arguments are known to be good.
    from ds_moe_ep.engine.job import run_job

    try:
        return run_job(options)
    except KeyboardInterrupt:
        return 130
    except Exception:
        rank = f"[rank {os.environ.get('RANK', '0')} {os.uname().nodename}]"
        print(f"{rank} {traceback.format_exc()}", file=sys.stderr, flush=True)
        return 1


def _parse() -> JobOptions:
    """Parses the arguments on every rank; only rank 0 shows what argparse has to say."""
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        return parse_options()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        try:
            with contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
                return parse_options()
        except SystemExit:
            let_rank_0_speak(rank)
            raise


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: the interpreter's orderly shutdown can wait for ranks that wait for this one,
    # and races with the threads of torch's backends (seen: an abort after a finished job).
    os._exit(code)
