"""The command line of launch/megatron_infer.py.

It parses and checks single values; what they mean together is checked in job.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.engine.options import add_timeouts, positive

__all__ = ["MegatronJobOptions", "parse_megatron_options"]


@dataclass(frozen=True)
class MegatronJobOptions:
    """What the user asked for; None where the file of arguments decides."""

    args: Path
    load: Path
    input: Path
    output: Path
    tokenizer: Path | None = None
    ep_size: int | None = None
    batch_size: int = 8
    dtype: str | None = None
    dispatcher: str | None = None
    timeout_s: float = 120.0
    start_timeout_s: float = 1800.0

    @property
    def journal_folder(self) -> None:
        """Scoring keeps no journal: what is not finished is done again."""


def parse_megatron_options(argv: Sequence[str] | None = None) -> MegatronJobOptions:
    """Parses the arguments; argparse ends the process with code 2 if they make no sense."""
    parser = argparse.ArgumentParser(
        prog="deepspeed launch/megatron_infer.py",
        description="Score prompts with a converted checkpoint in Megatron's own GPTModel.",
        allow_abbrev=False,
    )
    _add_files(parser.add_argument_group("files"))
    _add_execution(parser.add_argument_group("how to run it"))
    # DeepSpeed's launcher adds it; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    args = vars(parser.parse_args(argv))
    del args["local_rank"]
    return MegatronJobOptions(**args)


def _add_files(group: argparse._ArgumentGroup) -> None:
    for name, metavar, about in (
        ("--args", "FILE", "Megatron's arguments, as `ds-moe-ep config` writes them"),
        ("--load", "DIR", "checkpoint in torch_dist format, as `convert --to megatron` writes it"),
        ("--input", "FILE", "prompts: JSONL, or plain text with one a line"),
        ("--output", "FILE", "JSONL to write, in the order of the input"),
    ):
        group.add_argument(name, type=Path, required=True, metavar=metavar, help=about)
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="folder with the tokenizer's files, for prompts that are text (default: --load)",
    )


def _add_execution(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ep-size",
        type=positive(int),
        metavar="N",
        help="ranks that share the experts (default: --expert-model-parallel-size of --args)",
    )
    add(
        "--batch-size",
        type=positive(int),
        default=8,
        metavar="N",
        help="prompts a rank works on at a time (default: %(default)s)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: what --args says, --bf16, --fp16 or neither",
    )
    add(
        "--dispatcher",
        choices=("alltoall", "allgather"),
        help="how tokens reach their experts (default: --moe-token-dispatcher-type of --args)",
    )
    add_timeouts(group)
