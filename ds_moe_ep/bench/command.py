"""The benchmark's command line: starts the ranks of a table and writes down what they measured.

One command a table. It calls itself once for each number of ranks, through DeepSpeed's launcher.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from ds_moe_ep.bench import collectives, e2e, layer, load, replay, scale
from ds_moe_ep.bench.report import Report
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import init_distributed, read_rank_info
from ds_moe_ep.engine.console import only_rank_0_prints, quiet_libraries
from ds_moe_ep.errors import DistributedError, DsMoeEpError
from ds_moe_ep.local_machine import count_local_gpus, free_port

__all__ = ["main"]

_TABLES = {
    module.TABLE.name: module.TABLE for module in (load, layer, scale, collectives, e2e, replay)
}
_DOCS = Path(__file__).resolve().parents[2] / "docs"


def main(script: Path, argv: Sequence[str]) -> int:
    """Writes a table, or is one of the ranks that measure for it.

    Args:
        script: The file that was started.
        argv: Its arguments.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    table = _TABLES[args.table]
    try:
        if args.result:
            _run_rank(table, args)
        else:
            _write_table(table, args, script, argv)
    except DsMoeEpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measure against what a user would pick instead, both sides in one job.",
        allow_abbrev=False,
    )
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for table in _TABLES.values():
        command = tables.add_parser(table.name, help=table.heading, allow_abbrev=False)
        command.add_argument("--rounds", type=int, default=5, metavar="N", help="of each side")
        command.add_argument(
            "--out",
            type=Path,
            default=_DOCS,
            metavar="DIR",
            help="folder of benchmarks.md and benchmarks/ (default: the checkout's docs)",
        )
        command.set_defaults(result=None)
        if table.start is None:
            _add_launch_arguments(command)
        table.add_arguments(command)
    return parser


def _add_launch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hostfile", metavar="H", help="DeepSpeed hostfile (default: this machine alone)"
    )
    command.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="longest wait for a rank"
    )
    # For the ranks only.
    command.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    command.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def _write_table(table: Table, args: argparse.Namespace, script: Path, argv: Sequence[str]) -> None:
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="ds-moe-ep-bench-") as folder:
        work = Path(folder)
        print(f"{table.name}: preparing", file=sys.stderr)
        if table.prepare is not None:
            table.prepare(args, work)
        if table.start is None:
            for world_size in args.world:
                print(f"{table.name}: measuring with {world_size} ranks", file=sys.stderr)
                results += _launch(script, argv, world_size, args.hostfile, work)
        else:
            quiet_libraries()
            results = table.measure(args, table.start(args), work)
    command = shlex.join(["python", os.path.join("launch", script.name), *argv])
    report = Report(table.name, table.heading, command, table.to_markdown(results), results)
    report.write(args.out)
    print(report.to_markdown())
    print(f"\nwrote {args.out / 'benchmarks.md'}", file=sys.stderr)


def _launch(
    script: Path, argv: Sequence[str], world_size: int, hostfile: str | None, work: Path
) -> list[Result]:
    result = work / f"result-{world_size}.json"
    where = [f"--hostfile={hostfile}"] if hostfile else [f"--num_gpus={world_size}"]
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner"),
        *(*where, f"--master_port={free_port()}", "--no_local_rank"),
        *(str(script), *argv, f"--work={work}", f"--result={result}"),
    ]
    # The ranks share the cores: a thread each.
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if count_local_gpus() == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode != 0 or not result.exists():
        raise DistributedError(
            f"the ranks ended with exit code {ended.returncode} and no result: their errors stand "
            f"above.\n{ended.stdout}"
        )
    measured: list[Result] = json.loads(result.read_text(encoding="utf-8"))
    return measured


def _run_rank(table: Table, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # as infer.py does
    info = read_rank_info()
    quiet_libraries()
    with only_rank_0_prints(info.rank):
        job = init_distributed(info, timeout_s=args.timeout)
    results = table.measure(args, job, args.work)
    if info.rank == 0:
        args.result.write_text(json.dumps(results), encoding="utf-8")
    job.wait_for_all(args.timeout, "writing results")
