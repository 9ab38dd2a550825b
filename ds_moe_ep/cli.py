"""The `ds-moe-ep` command: reads the command line and calls what does the work.

Each subcommand imports what it needs when it runs, so that `ds-moe-ep plan` never waits for torch.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ds_moe_ep import __version__
from ds_moe_ep.cli_balance import add_balance_command
from ds_moe_ep.cli_convert import add_convert_command
from ds_moe_ep.cli_megatron import add_megatron_command
from ds_moe_ep.cli_predict import add_prediction_arguments, question_from
from ds_moe_ep.cli_preflight import add_preflight_command
from ds_moe_ep.cli_rehearse import add_rehearse_command
from ds_moe_ep.cli_report import add_report_commands
from ds_moe_ep.config.megatron_model import TRANSFORMER_IMPLS
from ds_moe_ep.errors import DsMoeEpError, PlanError
from ds_moe_ep.hostfile import Cluster, filter_cluster, local_cluster, read_hostfile

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand.

    Args:
        argv: the arguments, without the program's name; by default the command line's.

    Returns:
        The exit code: 0 done, 1 failed, 2 the input is refused, 130 interrupted.

    Raises:
        SystemExit: from argparse, with 2 for arguments it refuses and 0 after `--help`.
    """
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except DsMoeEpError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader, `head` say, has left; without this Python would fail again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="ds-moe-ep",
        description="Plan and prepare expert-parallel inference of Hugging Face MoE models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"ds-moe-ep {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    plan = commands.add_parser(
        "plan",
        help="show which GPU holds which experts, or why a plan does not fit",
        allow_abbrev=False,
    )
    _add_plan_arguments(plan)
    add_prediction_arguments(plan)
    plan.add_argument("--json", action="store_true", help="print JSON for other programs")
    plan.set_defaults(run=_plan)

    config = commands.add_parser(
        "config", help="write all files that a run of a plan needs", allow_abbrev=False
    )
    _add_plan_arguments(config)
    config.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    config.add_argument("--dtype", help="type of the weights at run time (default: the model's)")
    config.add_argument(
        "--megatron-transformer-impl",
        "--transformer-impl",
        choices=TRANSFORMER_IMPLS,
        default=TRANSFORMER_IMPLS[0],
        help="layers that megatron.args asks for (default: %(default)s)",
    )
    config.add_argument(
        "--megatron-grouped-gemm",
        "--grouped-gemm",
        action="store_true",
        help="let Megatron compute a rank's experts in one multiplication",
    )
    config.add_argument(
        "--monitor",
        type=Path,
        metavar="JSON",
        help="a DeepSpeed JSON of yours: what it sets up for DeepSpeed's monitor (tensorboard, "
        "csv_monitor, wandb, comet) goes into the two that are written",
    )
    config.set_defaults(run=_config)

    add_convert_command(commands)
    add_rehearse_command(commands)
    add_preflight_command(commands)
    add_balance_command(commands)
    add_megatron_command(commands)
    add_report_commands(commands)

    demo = commands.add_parser(
        "demo-model", help="write the bundled small model", allow_abbrev=False
    )
    demo.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    demo.set_defaults(run=_demo_model)
    return parser


def _add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        type=Path,
        metavar="M",
        help="Hugging Face model directory, expert-sharded checkpoint of `ds-moe-ep convert --to "
        "ep`, or bare config.json",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hostfile", metavar="H", help="DeepSpeed hostfile (default: this machine's GPUs)"
    )
    where.add_argument(
        "--num-gpus", type=int, metavar="N", help="plan for N GPUs (or CPU ranks) of this machine"
    )
    parser.add_argument("--include", default="", metavar="HOSTS", help="use these: host@host:0,2")
    parser.add_argument("--exclude", default="", metavar="HOSTS", help="use all but these")
    sizes = (
        (
            "ep",
            None,
            "ranks that each layer's experts are spread over (default: what fills the GPUs)",
        ),
        ("tp", 1, "ranks that each tensor is spread over"),
        ("pp", 1, "ranks that the layers are spread over"),
        ("dp", 1, "copies of each expert"),
    )
    for name, default, text in sizes:
        parser.add_argument(
            f"--{name}",
            f"--{name}-size",
            dest=f"{name}_size",
            type=int,
            default=default,
            metavar="N",
            help=text,
        )


def _cluster(args: argparse.Namespace) -> tuple[Cluster, list[str]]:
    """Return the GPUs that were asked for, and what the user should know about the choice."""
    if args.hostfile is not None:
        return read_hostfile(args.hostfile, include=args.include, exclude=args.exclude), []
    remarks = []
    num_slots, slots = args.num_gpus, tuple[int, ...]()
    if num_slots is None:
        from ds_moe_ep.local_machine import local_gpus

        slots = local_gpus()
        num_slots = len(slots)
        if num_slots == 0:
            num_slots = 1
            remarks.append(
                "No hostfile and no NVIDIA GPU on this machine: planned for one CPU rank. "
                "Use --hostfile H, or --num-gpus N."
            )
        else:
            remarks.append("No hostfile: planned for the GPUs of this machine.")
    elif num_slots < 1:
        raise PlanError(f"--num-gpus {num_slots}: at least 1 is needed.")
    cluster = local_cluster(num_slots, slots)
    return filter_cluster(cluster, include=args.include, exclude=args.exclude), remarks


def _plan(args: argparse.Namespace) -> int:
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.plan import make_plan
    from ds_moe_ep.plan_report import PlanReport
    from ds_moe_ep.predict.prediction import predict

    cluster, remarks = _cluster(args)
    spec = read_model_spec(args.model)
    plan = make_plan(cluster, spec, **_sizes(args))
    prediction = predict(plan, spec, cluster, question_from(args))
    report = PlanReport(plan, spec, cluster, prediction, tuple(remarks))
    if args.json:
        print(report.to_json())
    elif sys.stdout.isatty():
        report.print_rich()
    else:
        print(report.to_text())
    return 0


def _config(args: argparse.Namespace) -> int:
    from ds_moe_ep.config.bundle import write_bundle
    from ds_moe_ep.config.megatron import MegatronOptions
    from ds_moe_ep.config.run import read_monitor
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.plan import make_plan

    monitor = None if args.monitor is None else read_monitor(args.monitor)
    cluster, remarks = _cluster(args)
    spec = read_model_spec(args.model)
    plan = make_plan(cluster, spec, **_sizes(args))
    megatron = MegatronOptions(args.megatron_transformer_impl, args.megatron_grouped_gemm)
    report = write_bundle(
        args.model,
        cluster,
        plan,
        spec,
        args.out,
        dtype=args.dtype,
        megatron=megatron,
        monitor=monitor,
    )
    for remark in remarks:
        print(remark)
    for name in report.written:
        print(f"wrote {report.out / name}")
    for name, reason in report.not_written.items():
        print(f"no {name}: {reason}")
    return 0


def _demo_model(args: argparse.Namespace) -> int:
    from ds_moe_ep.demo import write_demo_model

    write_demo_model(args.out)
    print(f"wrote {args.out}")
    return 0


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    return {name: getattr(args, name) for name in ("ep_size", "tp_size", "pp_size", "dp_size")}
