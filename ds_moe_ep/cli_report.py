"""`ds-moe-ep report` and `ds-moe-ep top`: read their command lines and show what a job recorded.

What is shown is decided in monitor/; none of it imports torch.
"""

import argparse
from pathlib import Path

from ds_moe_ep.whole_file import check_writable, write_lines

__all__ = ["add_report_commands"]


def add_report_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds `report` and `top` to the subcommands of a parser."""
    report = commands.add_parser(
        "report",
        help="judge a finished job by its targets, and write an HTML report of it",
        description="Read what a job recorded with infer.py --metrics DIR, print a summary with a "
        "verdict on each target, and write DIR/report.html, which needs no network.",
        allow_abbrev=False,
    )
    report.add_argument(
        "metrics", type=Path, metavar="DIR", help="what was given to infer.py --metrics"
    )
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="the report (default: DIR/report.html)"
    )
    report.set_defaults(run=_report)
    top = commands.add_parser(
        "top",
        help="watch a job while it runs",
        description="Follow a job that runs with infer.py --metrics DIR: utilisation, memory, "
        "tokens/s and queue, by rank or by host. Without a terminal: as it is now, once.",
        allow_abbrev=False,
    )
    top.add_argument("metrics", type=Path, metavar="DIR", help="what is given to infer.py")
    top.set_defaults(run=_top)


def _report(args: argparse.Namespace) -> int:
    from ds_moe_ep.monitor.metrics_folder import read_metrics
    from ds_moe_ep.monitor.page import page
    from ds_moe_ep.monitor.summary_text import summary_text
    from ds_moe_ep.monitor.verdicts import judge

    metrics = read_metrics(args.metrics)
    path = args.metrics / "report.html" if args.out is None else args.out
    check_writable(path)
    verdicts = judge(metrics)
    write_lines(path, [page(metrics, verdicts)])
    print(summary_text(metrics, verdicts))
    print(f"\nwrote {path}")
    return 0


def _top(args: argparse.Namespace) -> int:
    from ds_moe_ep.monitor.top import top

    return top(args.metrics)
