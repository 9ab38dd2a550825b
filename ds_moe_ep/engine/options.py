"""The command line of launch/infer.py.

It parses and checks single values; what they mean together is checked in prepare.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["JobOptions", "parse_options"]


@dataclass(frozen=True)
class JobOptions:
    """What the user asked for; None where the default depends on the plan or the machine."""

    model: Path
    input: Path
    output: Path
    config: Path | None = None
    ep_size: int | None = None
    task: str = "generate"
    max_new_tokens: int = 64
    batch_size: int = 8
    dtype: str | None = None
    dispatcher: str = "auto"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    resume: bool = False
    metrics: Path | None = None
    timeout_s: float = 120.0
    load_timeout_s: float = 1800.0


def parse_options(argv: Sequence[str] | None = None) -> JobOptions:
    """Parses the arguments; argparse ends the process with code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/infer.py",
        description="Run a Hugging Face MoE model with its experts spread over all ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    parser.add_argument(
        "--input", type=Path, required=True, help="prompts: JSONL, or plain text with one a line"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="JSONL file to write, in input order"
    )
    parser.add_argument(
        "--config", type=Path, help="folder of `ds-moe-ep config`, or a DeepSpeed inference JSON"
    )
    parser.add_argument(
        "--ep-size", type=_positive(int), help="ranks that share the experts (default: all)"
    )
    parser.add_argument("--task", choices=("generate", "score"), default="generate")
    parser.add_argument("--max-new-tokens", type=_positive(int), default=64)
    parser.add_argument(
        "--batch-size", type=_positive(int), default=8, help="prompts a rank works on at a time"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: --config's, else the model's on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--dispatcher",
        choices=("auto", "alltoall"),
        default="auto",
        help="how tokens reach their experts",
    )
    parser.add_argument(
        "--temperature", type=_non_negative, default=0.0, help="0 is greedy decoding"
    )
    parser.add_argument(
        "--top-p", type=_share, default=1.0, help="share of the probability to sample from"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="with a prompt's id, fixes what is drawn for it"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on where an interrupted run stopped",
    )
    parser.add_argument("--metrics", type=Path, help="folder for metrics.jsonl, a line a rank")
    parser.add_argument(
        "--timeout", type=_positive(float), default=120.0, help="seconds any rank waits for another"
    )
    parser.add_argument(
        "--load-timeout",
        type=_positive(float),
        default=1800.0,
        help="seconds for all ranks to load their weights",
    )
    parser.add_argument(
        "--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS
    )  # from DeepSpeed's launcher
    args = vars(parser.parse_args(argv))
    args.pop("local_rank")
    args["timeout_s"], args["load_timeout_s"] = args.pop("timeout"), args.pop("load_timeout")
    return JobOptions(**args)


def _positive(kind):
    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _non_negative(text: str) -> float:
    value = float(text)
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not 0 or above")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0.0 < value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value
