"""`ds-moe-ep convert`: reads its command line and calls what does the work.

The arguments are declared without importing torch; the conversion imports it when it runs.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ds_moe_ep.cli_upcycle import add_upcycle_arguments, check_upcycle_arguments, upcycle

if TYPE_CHECKING:
    from ds_moe_ep.checkpoint.convert import Conversion
    from ds_moe_ep.checkpoint.writer import ShowProgress

__all__ = ["add_convert_command"]


def add_convert_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
) -> None:
    """Adds `convert` to the subcommands of a parser."""
    convert = commands.add_parser(
        "convert",
        help="convert a model directory to an expert-sharded checkpoint, or back; check one",
        description="Convert a Hugging Face model directory to an expert-sharded checkpoint "
        "(--to ep), to DeepSpeed's own MoE checkpoint (--to deepspeed) or to Megatron's (--to "
        "megatron), or an expert-sharded or Megatron checkpoint back (--to hf). Tensors stay bit "
        "by bit the same. A conversion that was interrupted goes on when it is started again.",
        allow_abbrev=False,
    )
    convert.add_argument("source", type=Path, metavar="SRC", help="folder to read")
    convert.add_argument(
        "target", type=Path, nargs="?", metavar="DST", help="folder to write; a new one"
    )
    what = convert.add_mutually_exclusive_group(required=True)
    what.add_argument("--to", choices=("ep", "hf", "deepspeed", "megatron"), help="what to write")
    what.add_argument(
        "--verify", action="store_true", help="compare every byte of SRC with its manifest"
    )
    convert.add_argument(
        "--ep-size",
        type=int,
        metavar="N",
        help="number of expert files (default: the largest up to 64 that divides the experts); "
        "the checkpoint loads on any other number of ranks too",
    )
    convert.add_argument(
        "--target-spec",
        choices=("local", "te"),
        help="--to megatron: whose layers are to load it, Megatron's own (its --transformer-impl "
        "local) or Transformer Engine's (default: te)",
    )
    convert.add_argument(
        "--ckpt",
        choices=("torch_dist",),
        help="--to megatron: the format, as in Megatron's --ckpt-format (default: torch_dist)",
    )
    convert.add_argument(
        "--config-from",
        type=Path,
        metavar="DIR",
        help="--to hf, of a checkpoint that Megatron saved: the Hugging Face directory with the "
        "model's config.json and tokenizer",
    )
    convert.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pickled weights (pytorch_model.bin) where SRC has no safetensors; only tensors "
        "are taken from them, and no code in them is run",
    )
    convert.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run and copy the model's own code, where config.json asks for it (auto_map)",
    )
    add_upcycle_arguments(convert)
    convert.set_defaults(run=_convert, refuse=convert.error)


def _convert(args: argparse.Namespace) -> int:
    _check_arguments(args)
    # Nothing is computed here, so DeepSpeed need not look for GPUs nor tell that there is none.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from ds_moe_ep.checkpoint.files import told_if_unreadable
    from ds_moe_ep.engine.console import byte_progress_bar as show_progress
    from ds_moe_ep.engine.console import quiet_libraries

    with told_if_unreadable(args.source, "checked" if args.verify else "converted"):
        if args.verify:
            done = _verify(args.source, show_progress)
        elif args.upcycle_experts is not None:
            done = upcycle(args)
        else:
            if args.to != "hf" or args.allow_pickle:  # transformers takes seconds to import
                quiet_libraries()
            done = _write(args, show_progress)
    size = f"{done.num_files} files, {done.num_bytes:,} bytes"
    if args.verify:
        _print(f"{done.folder} is whole: {size}")
        return 0
    _print(f"wrote {done.folder}: {size}, read again")
    if done.not_copied:
        _print(f"not copied: {', '.join(done.not_copied)}")
    return 0


def _print(text: str) -> None:
    """Prints names of files too, which need not be of letters that the output has."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding))


def _check_arguments(args: argparse.Namespace) -> None:
    if args.verify != (args.target is None):
        args.refuse("--verify takes SRC alone; --to takes SRC and DST")
    if args.ep_size is not None and args.to != "ep":
        args.refuse("--ep-size is for --to ep only")
    if args.to != "megatron" and (args.target_spec or args.ckpt):
        args.refuse("--target-spec and --ckpt are for --to megatron only")
    if args.config_from is not None and args.to != "hf":
        args.refuse("--config-from is for --to hf only")
    if args.verify and (args.allow_pickle or args.trust_remote_code):
        args.refuse("--allow-pickle and --trust-remote-code are for --to only")
    check_upcycle_arguments(args)


def _verify(source: Path, show_progress: "ShowProgress") -> "Conversion":
    from ds_moe_ep.checkpoint.convert import verify
    from ds_moe_ep.checkpoint.files import is_of_megatron

    if is_of_megatron(source):
        from ds_moe_ep.checkpoint.megatron.convert import verify_megatron

        return verify_megatron(source, show_progress=show_progress)
    return verify(source, show_progress=show_progress)


def _write(args: argparse.Namespace, show_progress: "ShowProgress") -> "Conversion":
    from ds_moe_ep.checkpoint.convert import to_deepspeed, to_expert_sharded, to_hugging_face
    from ds_moe_ep.checkpoint.files import is_of_megatron

    source, target = args.source, args.target
    settings = {
        "allow_pickle": args.allow_pickle,
        "trust_remote_code": args.trust_remote_code,
        "show_progress": show_progress,
    }
    if args.to == "ep":
        return to_expert_sharded(source, target, args.ep_size, **settings)
    if args.to == "deepspeed":
        return to_deepspeed(source, target, **settings)
    if args.to == "megatron":
        from ds_moe_ep.checkpoint.megatron.convert import to_megatron

        return to_megatron(source, target, args.target_spec or "te", **settings)
    if is_of_megatron(source):
        from ds_moe_ep.checkpoint.megatron.convert import from_megatron

        if args.allow_pickle or args.trust_remote_code:
            args.refuse("--allow-pickle and --trust-remote-code are not for Megatron's checkpoints")
        return from_megatron(source, target, args.config_from, show_progress=show_progress)
    if args.config_from is not None:
        args.refuse(f"--config-from is for checkpoints of Megatron, which {source} is not")
    return to_hugging_face(source, target, **settings)
