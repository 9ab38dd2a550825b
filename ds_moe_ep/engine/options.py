"""The command line of launch/infer.py.

It parses and checks single values; what they mean together is checked in prepare.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "DISPATCHER_NAMES",
    "JobOptions",
    "add_timeouts",
    "describe_options",
    "parse_options",
    "positive",
]

DISPATCHER_NAMES = (
    "auto",
    "alltoall",
    "allgather",
    "allreduce",
    "deepspeed",
    "alltoall-2level",
    "allgather-2level",
)
"""``auto`` and the keys of ``moe.dispatch.DISPATCHERS``, without importing torch for them."""

_LAST_PORT = 65535
_NO_OUTPUT = "preflight"  # nothing of this name is written


@dataclass(frozen=True)
class JobOptions:
    """What the user asked for; None where the default depends on the plan or the machine.

    With `preflight` nothing is read from `input` if it is None, and nothing written to `output`.
    """

    model: Path
    input: Path | None
    output: Path
    config: Path | None = None
    ep_size: int | None = None
    task: str = "generate"
    max_new_tokens: int = 64
    batch_size: int | None = None
    dtype: str | None = None
    dispatcher: str = "auto"
    batch_mode: str = "sharded"
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    resume: bool = False
    preflight: bool = False
    metrics: Path | None = None
    metrics_port: int | None = None
    placement: Path | None = None
    cuda_graphs: bool = False
    timeout_s: float = 120.0
    start_timeout_s: float = 1800.0

    @property
    def journal_folder(self) -> Path:
        """Where finished prompts are kept until the output is written."""
        return self.output.with_name(self.output.name + ".partial")


def parse_options(
    argv: Sequence[str] | None = None, *, prog: str = "deepspeed launch/infer.py"
) -> JobOptions:
    """Parses the arguments; argparse ends the process with code 2 if they make no sense."""
    parser = _parser(prog)
    args = vars(parser.parse_args(argv))
    del args["local_rank"]
    if args["preflight"]:
        args["output"] = args["output"] or Path(_NO_OUTPUT)
    elif missing := [f"--{name}" for name in ("input", "output") if args[name] is None]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    return JobOptions(**args)


def describe_options() -> dict[str, tuple[str, str]]:
    """Returns what stands for each option's value in a help text, and its help, by long name.

    A default is written out.
    """
    described: dict[str, tuple[str, str]] = {}
    for action in _parser("")._actions:
        shown = action.metavar or f"{{{','.join(action.choices or ())}}}"
        text = (action.help or "") % {"default": action.default}
        described |= {name: (str(shown), text) for name in action.option_strings}
    return described


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Run a Hugging Face MoE model with its experts spread over all ranks.",
        allow_abbrev=False,
    )
    _add_files(parser.add_argument_group("files"))
    _add_decoding(parser.add_argument_group("what to do"))
    _add_execution(parser.add_argument_group("how to run it"))
    # DeepSpeed's launcher adds it; LOCAL_RANK says the same.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _add_files(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="Hugging Face model directory, or an expert-sharded checkpoint of `ds-moe-ep convert "
        "--to ep`",
    )
    add(
        "--input",
        type=Path,
        metavar="FILE",
        help="prompts: JSONL, or plain text with one a line",
    )
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="JSONL to write, in the order of the input",
    )
    add(
        "--config",
        type=Path,
        metavar="PATH",
        help="folder of `ds-moe-ep config`, or a DeepSpeed inference JSON",
    )
    add(
        "--metrics",
        type=Path,
        metavar="DIR",
        help="folder to record the run in, for `ds-moe-ep report` and `ds-moe-ep top`",
    )
    add(
        "--placement",
        type=Path,
        metavar="FILE",
        help="placement.json of `ds-moe-ep balance`: which experts each rank holds (default: "
        "consecutive ones)",
    )
    add(
        "--resume",
        action="store_true",
        help="go on where an interrupted run with the same output stopped",
    )
    add(
        "--preflight",
        action="store_true",
        help="go through the four phases of the bring-up, thoroughly, and stop before any prompt",
    )


def _add_decoding(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--task",
        choices=("generate", "score"),
        default="generate",
        help="write completions (default) or log probabilities of the prompts",
    )
    add(
        "--max-new-tokens",
        type=positive(int),
        default=64,
        metavar="N",
        help="tokens of a completion at most (default: %(default)s)",
    )
    add(
        "--temperature",
        type=_non_negative,
        default=0.0,
        metavar="T",
        help="0 is greedy decoding (default)",
    )
    add(
        "--top-p",
        type=_share,
        default=1.0,
        metavar="P",
        help="share of the probability to sample from (default: 1, all)",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the sampling; a prompt's tokens depend on it and on the prompt's id only "
        "(default: %(default)s)",
    )


def _add_execution(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--ep-size",
        type=positive(int),
        metavar="N",
        help="ranks that share the experts (default: --config's, else all)",
    )
    add(
        "--batch-size",
        type=positive(int),
        metavar="N",
        help="prompts a rank works on at a time (default: what memory has room for, up to 32)",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="default: --config's, else the model's on a GPU and float32 on a CPU",
    )
    add(
        "--dispatcher",
        choices=DISPATCHER_NAMES,
        default="auto",
        help="how tokens reach their experts (default: %(default)s; deepspeed: padded as in "
        "DeepSpeed's own layer, to compare with)",
    )
    add(
        "--batch-mode",
        choices=("sharded", "replicated"),
        default="sharded",
        help="each rank its own prompts (default: throughput), or all ranks all prompts (latency)",
    )
    add(
        "--cuda-graphs",
        action="store_true",
        help="capture one decode pass as a CUDA graph and replay it for each (without a GPU: the "
        "same passes, run as usual)",
    )
    add(
        "--metrics-port",
        type=_port,
        metavar="PORT",
        help="serve the figures of all ranks to Prometheus, on the host of rank 0",
    )
    add_timeouts(group)


def add_timeouts(group: argparse._ArgumentGroup) -> None:
    """Adds --timeout and --start-timeout."""
    add = group.add_argument
    add(
        "--timeout",
        dest="timeout_s",
        type=positive(float),
        default=120.0,
        metavar="S",
        help="seconds any rank waits for another (default: %(default).0f)",
    )
    add(
        "--start-timeout",
        dest="start_timeout_s",
        type=positive(float),
        default=1800.0,
        metavar="S",
        help="seconds for all ranks to come up, and to load (default: %(default).0f)",
    )


def positive(kind):
    """Returns an argparse type for finite numbers above 0, of type `kind`."""

    def parse(text: str):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= _LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text} is not a port: use 1 to {_LAST_PORT}")
    return int(text)


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
