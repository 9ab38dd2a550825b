"""The upcycling part of `ds-moe-ep convert`: its arguments, and the call of what does the work.

The arguments are declared without importing torch; the conversion imports it when it runs.
"""

import argparse
import math
from typing import TYPE_CHECKING

from ds_moe_ep.upcycle_settings import METHODS

if TYPE_CHECKING:
    from ds_moe_ep.checkpoint.convert import Conversion

__all__ = ["add_upcycle_arguments", "check_upcycle_arguments", "upcycle"]

# What only makes sense with --upcycle-experts, and its value where it is not given.
_DEFAULTS = {
    "top_k": None,
    "every": None,
    "layers": None,
    "method": "copy",
    "router_init": 0.02,
    "noise": 0.0,
    "seed": 0,
    "ffn_class": None,
}


def add_upcycle_arguments(convert: argparse.ArgumentParser) -> None:
    """Adds the arguments that make a dense model an MoE model."""
    group = convert.add_argument_group(
        "dense models",
        "With --upcycle-experts, SRC is a dense Hugging Face model, chosen FFNs of which become "
        "the experts of MoE layers with a new router (sparse upcycling, arXiv 2212.05055). --to hf "
        "writes a model of an MoE family of transformers, where one computes the same.",
    )
    group.add_argument("--upcycle-experts", type=int, metavar="E", help="experts of each MoE layer")
    group.add_argument("--top-k", type=int, metavar="K", help="experts a token is sent to")
    where = group.add_mutually_exclusive_group()
    where.add_argument(
        "--every", type=int, metavar="N", help="give experts to every Nth layer (default: to all)"
    )
    where.add_argument(
        "--layers", type=_layers, metavar="LIST", help="give experts to these layers: 3,5,7"
    )
    group.add_argument(
        "--method",
        choices=METHODS,
        help="copy: every expert is the FFN (default); split: its neurons are spread over them",
    )
    group.add_argument(
        "--router-init",
        type=_router_std,
        metavar="HOW",
        help="zero, or normal:STD (default: normal:0.02)",
    )
    group.add_argument(
        "--noise",
        type=_std,
        metavar="STD",
        help="add noise to the experts, of this standard deviation relative to each tensor's own, "
        "so that they can diverge (default: 0)",
    )
    group.add_argument(
        "--seed", type=int, metavar="S", help="what router and noise are drawn from (default: 0)"
    )
    group.add_argument(
        "--ffn-class", metavar="NAME", help="class of the FFNs (default: the one that is an FFN)"
    )


def check_upcycle_arguments(args: argparse.Namespace) -> None:
    """Refuses arguments that make no sense together.

    Raises:
        SystemExit: with 2, from argparse.
    """
    if args.upcycle_experts is None:
        for name in _DEFAULTS:
            if getattr(args, name) is not None:
                args.refuse(f"--{name.replace('_', '-')} is for --upcycle-experts only")
    elif args.to not in ("ep", "hf"):
        args.refuse(
            "--upcycle-experts takes --to ep or --to hf; for DeepSpeed's format convert what --to "
            "ep wrote: --to deepspeed"
        )
    elif args.trust_remote_code:
        args.refuse("--trust-remote-code is not for --upcycle-experts")
    elif args.top_k is None:
        args.refuse("--upcycle-experts needs --top-k: how many experts a token is sent to")


def upcycle(args: argparse.Namespace) -> "Conversion":
    """Upcycles a dense model as the checked arguments say; returns what was written.

    Raises:
        DsMoeEpError: It cannot be done.
    """
    from ds_moe_ep.checkpoint.upcycle import upcycle_to_expert_sharded, upcycle_to_hugging_face
    from ds_moe_ep.checkpoint.upcycled_tensors import UpcycleRequest
    from ds_moe_ep.engine.console import byte_progress_bar, quiet_libraries

    quiet_libraries()
    asked = {name: getattr(args, name) for name in _DEFAULTS}
    asked |= {name: value for name, value in _DEFAULTS.items() if asked[name] is None}
    router_std = asked.pop("router_init")
    request = UpcycleRequest(num_experts=args.upcycle_experts, router_std=router_std, **asked)
    how = {"allow_pickle": args.allow_pickle, "show_progress": byte_progress_bar}
    if args.to == "hf":
        return upcycle_to_hugging_face(args.source, args.target, request, **how)
    return upcycle_to_expert_sharded(args.source, args.target, request, args.ep_size, **how)


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: layer numbers are needed, like 3,5,7"
        ) from None


def _router_std(text: str) -> float:
    how, _, std = text.partition(":")
    if text == "zero":
        return 0.0
    if how != "normal":
        raise argparse.ArgumentTypeError(f"{text!r}: use zero, or normal:STD, like normal:0.02")
    return _std(std)


def _std(text: str) -> float:
    try:
        std = float(text)
    except ValueError:
        std = math.nan
    if not 0 <= std < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a standard deviation of at least 0 is needed")
    return std
