"""`ds-moe-ep rehearse`: reads its command line and calls what does the work."""

import argparse
import signal
from pathlib import Path

from ds_moe_ep.hostfile import read_hostfile

__all__ = ["add_rehearse_command"]


def add_rehearse_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Adds `rehearse` to the subcommands of a parser."""
    rehearse = commands.add_parser(
        "rehearse",
        help="run a job of many hosts on this machine, small but whole, before the real one",
        description="Make the hosts of a hostfile on this machine as network namespaces (takes "
        "root; without it, as many ranks on one host), shrink the model's widths but not its "
        "layers, experts and routing, launch infer.py on all ranks with the generated files and "
        "DeepSpeed's own launcher, and compare the outputs with those of one process.",
        allow_abbrev=False,
    )
    rehearse.add_argument(
        "--model", required=True, type=Path, metavar="M", help="model directory or config.json"
    )
    rehearse.add_argument("--hostfile", required=True, metavar="H", help="DeepSpeed hostfile")
    rehearse.add_argument(
        "--ep",
        dest="ep_size",
        type=int,
        metavar="N",
        help="ranks that share the experts, as for launch/infer.py: groups of N fill the hosts "
        "(default: all GPUs)",
    )
    rehearse.add_argument("--cuda-graphs", action="store_true", help="as for launch/infer.py")
    rehearse.set_defaults(run=_rehearse)


def _rehearse(args: argparse.Namespace) -> int:
    from ds_moe_ep.model_spec import read_model_spec
    from ds_moe_ep.plan import make_plan
    from ds_moe_ep.rehearsal.guard import go_on_guarded
    from ds_moe_ep.rehearsal.rehearse import rehearse

    cluster = read_hostfile(args.hostfile)
    # As launch/infer.py does with its --ep-size; what leaves ranks over is refused.
    ep_size = args.ep_size
    dp_size = max(1, cluster.num_gpus // ep_size) if ep_size and ep_size > 0 else 1
    plan = make_plan(cluster, read_model_spec(args.model), ep_size=ep_size, dp_size=dp_size)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up first
    folder = go_on_guarded("ds-moe-ep-rehearsal-")
    rehearse(
        args.model,
        cluster,
        plan,
        folder,
        options=["--cuda-graphs"] if args.cuda_graphs else [],
        tell=lambda line: print(line, flush=True),
    )
    return 0
