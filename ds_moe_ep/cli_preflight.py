"""`ds-moe-ep preflight`: reads its command line, has the hosts asked and the ranks started."""

import argparse
import functools
import os
import signal
from pathlib import Path

from ds_moe_ep.engine.options import describe_options
from ds_moe_ep.hostfile import Cluster, local_cluster, read_hostfile

__all__ = ["add_preflight_command"]

_SAME_AS_INFER = ("task", "batch_size", "max_new_tokens", "dtype", "dispatcher", "batch_mode")
_FILES = ("config", "input", "metrics", "placement")
_TIMEOUTS = ("timeout", "start_timeout")


def add_preflight_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Adds `preflight` to the subcommands of a parser."""
    preflight = commands.add_parser(
        "preflight",
        help="check hosts, communication, batches and memory before a job, in four phases",
        description="Ask every host at once whether it has what the job needs, then start all "
        "ranks with DeepSpeed's launcher, load the model and go through the four phases of the "
        "bring-up, without serving a prompt. Exit code 0: pass or warn, 2: a phase failed.",
        allow_abbrev=False,
    )
    add = preflight.add_argument
    same = describe_options()
    add("--model", required=True, type=Path, metavar="M", help=same["--model"][1])
    where = preflight.add_mutually_exclusive_group()
    where.add_argument("--hostfile", metavar="H", help="DeepSpeed hostfile (default: this machine)")
    where.add_argument("--num-gpus", type=int, metavar="N", help="GPUs, or ranks, of this machine")
    add("--include", default="", metavar="HOSTS", help="use these: host@host:0,2")
    add("--exclude", default="", metavar="HOSTS", help="use all but these")
    add("--hosts-only", action="store_true", help="ask the hosts, and start no rank")
    add("--quick", action="store_true", help="compare model files by size and header only")
    add(
        "--survey-timeout",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds a host may take to answer, besides reading files (default: %(default).0f)",
    )
    add("--master-addr", metavar="A", help="where ranks meet (default: the first host's address)")
    add("--master-port", type=int, metavar="P", help="and the port (default: one free here)")
    job = preflight.add_argument_group("as for launch/infer.py")
    own = {
        "--input": f"{same['--input'][1]} (default: made-up ones)",
        "--metrics": "folder for what is found: survey.jsonl and bringup.jsonl",
    }
    for name in ("ep_size", *_SAME_AS_INFER, *_FILES, *_TIMEOUTS):
        option = f"--{name.replace('_', '-')}"
        metavar, text = same[option]
        job.add_argument(
            *(["--ep"] if name == "ep_size" else []),
            option,
            dest=name,
            type=Path if name in _FILES else str,
            metavar=metavar,
            help=own.get(option, text),
        )
    preflight.set_defaults(run=_preflight)


def _preflight(args: argparse.Namespace) -> int:
    from ds_moe_ep.bringup.preflight import Launch, ask_hosts, preflight
    from ds_moe_ep.bringup.survey import Survey
    from ds_moe_ep.engine.options import parse_options
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.monitor.metrics_folder import check_metrics_folder
    from ds_moe_ep.plan import make_plan

    for number in (signal.SIGTERM, signal.SIGHUP):  # clean up first
        signal.signal(number, signal.default_int_handler)
    arguments = ["--preflight", "--model", str(args.model.absolute())]
    for name in (*_SAME_AS_INFER, "ep_size", *_TIMEOUTS):
        arguments += _given(name, getattr(args, name))
    for name in _FILES:
        path = getattr(args, name)
        arguments += _given(name, None if path is None else path.absolute())
    # What is wrong with one of them is said before any host is asked.
    options = parse_options(arguments, prog="ds-moe-ep preflight")
    if options.metrics is not None:
        check_metrics_folder(options.metrics)
    cluster, on_gpus = _cluster(args)
    spec, ep_size = read_model_spec(args.model), options.ep_size
    asked = Survey(args.model.absolute(), not args.quick, on_gpus, args.survey_timeout)
    tell = functools.partial(print, flush=True)
    if args.hosts_only:
        ask_hosts(cluster, asked, metrics=options.metrics, tell=tell, is_brief=True)
        return 0
    dp_size = max(1, cluster.num_gpus // (ep_size or cluster.num_gpus))
    if options.config is None:
        make_plan(cluster, spec, ep_size=ep_size, dp_size=dp_size)
    return preflight(
        cluster,
        asked,
        Launch(
            tuple(arguments),
            hostfile=Path(args.hostfile).absolute() if args.hostfile else None,
            is_filtered=bool(args.include or args.exclude),
            master_addr=args.master_addr,
            master_port=args.master_port,
        ),
        metrics=options.metrics,
        tell=tell,
    )


def _given(name: str, value: object) -> list[str]:
    return [] if value is None else [f"--{name.replace('_', '-')}", str(value)]


def _cluster(args: argparse.Namespace) -> tuple[Cluster, bool | None]:
    """Return the slots, and whether they are GPUs; None where the hosts are to decide."""
    on_gpus = False if os.environ.get("DS_ACCELERATOR") == "cpu" else None
    if args.hostfile is not None:
        return read_hostfile(args.hostfile, include=args.include, exclude=args.exclude), on_gpus
    from ds_moe_ep.hostfile import filter_cluster
    from ds_moe_ep.local_machine import local_gpus

    slots = local_gpus() if args.num_gpus is None else ()
    cluster = local_cluster(len(slots) or 1 if args.num_gpus is None else args.num_gpus, slots)
    return filter_cluster(cluster, include=args.include, exclude=args.exclude), on_gpus
