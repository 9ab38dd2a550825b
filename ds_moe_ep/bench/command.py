"""The benchmark's command line: starts the ranks of a table and writes down what they measured.

One command a table. It calls itself once for each number of ranks, through DeepSpeed's launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_moe_ep.bench import (
    balance,
    balance_jobs,
    bars,
    collectives,
    e2e,
    layer,
    load,
    monitor,
    overlap,
    predict,
    predict_replay,
    replay,
    scale,
)
from ds_moe_ep.bench.report import Report, write_section
from ds_moe_ep.bench.table import Result, Table
from ds_moe_ep.dist.groups import init_distributed, read_rank_info
from ds_moe_ep.engine.console import only_rank_0_prints, quiet_libraries
from ds_moe_ep.engine.options import positive
from ds_moe_ep.errors import ConfigError, DistributedError, DsMoeEpError
from ds_moe_ep.heap import keep_freed_memory
from ds_moe_ep.hostfile import Cluster, first_slots, read_hostfile
from ds_moe_ep.local_machine import free_port, one_thread_each
from ds_moe_ep.rehearsal.hosts import SimulatedHosts, simulate_hosts
from ds_moe_ep.rehearsal.shared_start import shared_start

__all__ = ["main"]

_TABLES = {
    table.name: table
    for table in (
        *(load.TABLE, layer.TABLE, overlap.TABLE, scale.TABLE, collectives.TABLE, e2e.TABLE),
        *(e2e.UNEVEN, monitor.TABLE, replay.TABLE, predict.TABLE, balance.TABLE),
        balance_jobs.TABLE,
    )
}
_DOCS = Path(__file__).resolve().parents[2] / "docs"


@dataclass(frozen=True)
class _Computed:
    """A section that recorded tables alone make: its help, its file in docs/, and what makes it."""

    heading: str
    document: str
    to_markdown: Callable[[Path], str]


_COMPUTED = {
    "bars": _Computed("What must be reached, and whether it is", bars.DOCUMENT, bars.to_markdown),
    predict_replay.NAME: _Computed(
        predict_replay.HEADING, predict_replay.DOCUMENT, predict_replay.to_markdown
    ),
}


def main(script: Path, argv: Sequence[str], work: Path | None) -> int:
    """Writes a table, or is one of the ranks that measure for it.

    Args:
        script: The file that was started.
        argv: Its arguments.
        work: A folder for temporary files; a rank has it among its arguments.

    Returns:
        The exit code.
    """
    args = _parser().parse_args(argv)
    try:
        if args.table in _COMPUTED:
            _write_computed(args.table, args.out)
        elif work is None:
            _run_rank(_TABLES[args.table], args)
        else:
            _write_table(_TABLES[args.table], args, script, argv, work)
    except DsMoeEpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench.py",
        description="Measure ds_moe_ep, mostly against what a user would pick instead.",
        allow_abbrev=False,
    )
    tables = parser.add_subparsers(dest="table", required=True, metavar="TABLE")
    for name, section in _COMPUTED.items():
        command = tables.add_parser(name, help=section.heading, allow_abbrev=False)
        _add_out_argument(command, section.document)
    for table in _TABLES.values():
        command = tables.add_parser(table.name, help=table.heading, allow_abbrev=False)
        command.add_argument(
            "--rounds", type=positive(int), default=5, metavar="N", help="rounds of each side"
        )
        _add_out_argument(command, table.document)
        command.set_defaults(result=None, hostfile=None, simulate_hosts=False)
        if table.measure_alone is None:
            _add_launch_arguments(command)
        table.add_arguments(command)
    return parser


def _add_out_argument(command: argparse.ArgumentParser, document: str) -> None:
    command.add_argument(
        "--out",
        type=Path,
        default=_DOCS,
        metavar="DIR",
        help=f"folder of {document} and benchmarks/, whose table is replaced (default: the "
        "checkout's docs)",
    )


def _add_launch_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--hostfile",
        type=Path,
        metavar="H",
        help="DeepSpeed hostfile, whose first slots are used (default: this machine alone). Its "
        "hosts must see this machine's TMPDIR",
    )
    command.add_argument(
        "--simulate-hosts",
        action="store_true",
        help="make the hosts of --hostfile on this machine, as network namespaces (takes root)",
    )
    command.add_argument(
        "--timeout", type=float, default=600.0, metavar="S", help="longest wait for a rank"
    )
    # For the ranks only.
    command.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    command.add_argument("--result", type=Path, help=argparse.SUPPRESS)


def _write_computed(name: str, docs: Path) -> None:
    section = _COMPUTED[name]
    text = section.to_markdown(docs / "benchmarks")
    write_section(docs / section.document, name, text)
    print(text)
    print(f"\nwrote {docs / section.document}", file=sys.stderr)


def _write_table(
    table: Table, args: argparse.Namespace, script: Path, argv: Sequence[str], work: Path
) -> None:
    results: list[Result] = []
    print(f"{table.name}: preparing", file=sys.stderr)
    if table.prepare is not None:
        table.prepare(args, work)
    if table.measure_alone is not None:
        quiet_libraries()
        results = table.measure_alone(args, work)
    else:
        with _place(args, script) as place:
            for world_size in args.world:
                print(f"{table.name}: measuring with {world_size} ranks", file=sys.stderr)
                results += _launch(place, argv, world_size, work)
    command = shlex.join(["python", os.path.join("launch", script.name), *argv])
    name, heading = table.name, table.heading
    if args.hostfile:
        name, heading = f"{name}-hosts", f"{heading}, on {read_hostfile(args.hostfile).describe()}"
    elif variant := table.variant(args):
        name, heading = f"{name}-{variant[0]}", f"{heading}, {variant[1]}"
    text = table.to_markdown(results)
    report = Report(name, heading, command, text, results, document=table.document)
    report.write(args.out)
    print(report.to_markdown())
    print(f"\nwrote {args.out / table.document}", file=sys.stderr)


@dataclass(frozen=True)
class _Place:
    """Where ranks are started: this machine, or a cluster, whose hosts may be made here."""

    script: Path
    cluster: Cluster | None = None
    hosts: SimulatedHosts | None = None


@contextlib.contextmanager
def _place(args: argparse.Namespace, script: Path) -> Iterator[_Place]:
    cluster = read_hostfile(args.hostfile) if args.hostfile else None
    if not args.simulate_hosts:
        yield _Place(script, cluster)
        return
    if cluster is None:
        raise ConfigError("--simulate-hosts makes the hosts of a hostfile: add --hostfile H.")
    starter, variables = shared_start(script, __name__, "transformers.models.qwen3_moe")
    with simulate_hosts(cluster, variables) as hosts:
        yield _Place(starter, cluster, hosts)


def _launch(place: _Place, argv: Sequence[str], world_size: int, work: Path) -> list[Result]:
    result = work / f"result-{world_size}.json"
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    if place.cluster is None:
        command.append(f"--num_gpus={world_size}")
    else:
        hostfile = work / f"hostfile-{world_size}"
        hostfile.write_text(first_slots(place.cluster, world_size).to_hostfile(), encoding="utf-8")
        # Forced: DeepSpeed would run a hostfile of one host on the machine at hand.
        command += [f"--hostfile={hostfile}", "--launcher=pdsh", "--force_multi"]
    command += [f"--master_port={free_port()}", "--no_local_rank"]
    command += [str(place.script), *argv, f"--work={work}", f"--result={result}"]
    if place.hosts is not None:
        command = place.hosts.command(command)
    ended = subprocess.run(
        command, env=one_thread_each(), stdout=subprocess.PIPE, text=True, check=False
    )
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
    keep_freed_memory()  # as loading leaves it, for our peers too
    info = read_rank_info()
    quiet_libraries()
    with only_rank_0_prints(info.rank):
        job = init_distributed(info, timeout_s=args.timeout)
    assert table.measure is not None  # else there are no ranks
    results = table.measure(args, job, args.work)
    if info.rank == 0:
        args.result.write_text(json.dumps(results), encoding="utf-8")
    job.wait_for_all(args.timeout, "writing results")
