"""The options of `ds-moe-ep plan` that ask for predictions.

What they mean is decided in predict/; reading them imports none of it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ds_moe_ep.predict.prediction import Question

__all__ = ["add_prediction_arguments", "question_from"]


def add_prediction_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options in a group of their own."""
    group = parser.add_argument_group("predictions")
    group.add_argument(
        "--gpu", metavar="NAME", help="what a rank computes on: h200, h100, a100-80g or cpu"
    )
    group.add_argument(
        "--link",
        metavar="NAME",
        help="what connects hosts: ib-400g (default), ib-200g, ib-100g, tcp-100g, tcp-25g",
    )
    group.add_argument(
        "--host-link",
        metavar="NAME",
        help="what connects the GPUs of a host: nvlink4, nvlink3, pcie5, pcie4, shm (default: "
        "what the GPU has)",
    )
    group.add_argument(
        "--calibration",
        type=Path,
        nargs="+",
        default=(),
        metavar="FILE",
        help="use what launch/bench.py predict, replay or collectives measured (their JSON)",
    )
    group.add_argument("--memory-gib", type=float, metavar="GIB", help="memory of a GPU")
    group.add_argument(
        "--context-len",
        type=int,
        metavar="N",
        help="tokens of a prompt and its completion (default: 2048, or the model's longest)",
    )
    group.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help="tokens of the completion among them; 0: prompts are scored (default: 128)",
    )
    group.add_argument(
        "--batch-size", type=int, metavar="N", help="also predict this many prompts a GPU"
    )
    group.add_argument(
        "--targets",
        metavar="NAME=VALUE,...",
        help="say whether these are met, and up to how many tokens: "
        "latency_ms=8,sequences_per_s=120000,seq_len=N,new_tokens=N",
    )


def question_from(args: argparse.Namespace) -> Question:
    """Return what was asked for."""
    from ds_moe_ep.predict.prediction import Question

    return Question(
        gpu=args.gpu,
        link=args.link,
        host_link=args.host_link,
        calibration=tuple(args.calibration),
        memory_gib=args.memory_gib,
        context_len=args.context_len,
        new_tokens=args.new_tokens,
        batch_size=args.batch_size,
        targets=args.targets,
    )
