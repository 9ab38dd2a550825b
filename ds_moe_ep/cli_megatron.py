"""`ds-moe-ep megatron check`: reads its command line, asks Megatron and prints what it said."""

import argparse
import json
from pathlib import Path

__all__ = ["add_megatron_command"]


def add_megatron_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Adds `megatron` to the subcommands of a parser."""
    megatron = commands.add_parser("megatron", help="what concerns Megatron-LM", allow_abbrev=False)
    subcommands = megatron.add_subparsers(dest="megatron_command", required=True, metavar="COMMAND")
    check = subcommands.add_parser(
        "check",
        help="ask Megatron's own code about arguments, for every rank, without a GPU",
        description="Let megatron-core parse and validate the arguments, configure the model, make "
        "process groups and build the model without memory, for each rank in turn in this process. "
        "Exit code 0: it takes them, 2: a stage refuses them, in Megatron's own words.",
        allow_abbrev=False,
    )
    check.add_argument(
        "--args", required=True, type=Path, metavar="FILE", help="megatron.args, or one like it"
    )
    check.add_argument(
        "--world", required=True, type=int, metavar="N", help="number of ranks they are for"
    )
    check.add_argument("--json", action="store_true", help="print JSON for other programs")
    check.set_defaults(run=_check)


def _check(args: argparse.Namespace) -> int:
    from ds_moe_ep.megatron.check import check_arguments

    report = check_arguments(args.args, args.world)
    print(json.dumps(report.to_json()) if args.json else report.to_text(), end="")
    return 2 if report.problems else 0
