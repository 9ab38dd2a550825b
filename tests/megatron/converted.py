"""Tiny models of the families that Megatron runs, on the way that a user's model goes.

Saved by Hugging Face, converted to torch_dist, described by generated arguments, which Megatron's
parser reads, and loaded by Megatron's own loading: nothing is put in place by hand.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ds_moe_ep.checkpoint.megatron.convert import to_megatron
from ds_moe_ep.checkpoint.megatron.stored import open_torch_dist
from ds_moe_ep.config.megatron import MegatronOptions, megatron_args
from ds_moe_ep.megatron.arguments import parse_arguments, read_arguments
from ds_moe_ep.megatron.model import build_model, load_weights
from ds_moe_ep.model_spec import read_model_spec
from ds_moe_ep.plan import ParallelPlan
from tests.helpers.families import build_tiny
from tests.helpers.families.megatron import MEGATRON_CASES

__all__ = ["load_converted", "save_converted"]


def save_converted(case: str, folder: Path, world_size: int = 1) -> PreTrainedModel:
    """Writes a case's converted checkpoint and, for each ep_size, its arguments.

    Args:
        case: One of `MEGATRON_CASES`.
        folder: Where: `checkpoint` and `ep1.args`, `ep2.args` and so on.
        world_size: The number of ranks that the arguments are for.

    Returns:
        The model that was converted.
    """
    family, changes = MEGATRON_CASES[case]
    model = build_tiny(family, **changes)
    model.save_pretrained(folder / "source")
    to_megatron(folder / "source", folder / "checkpoint", "local")
    spec = read_model_spec(folder / "source")
    config = json.loads((folder / "source" / "config.json").read_text())
    for ep_size in (size for size in (1, 2, 4) if world_size % size == 0):
        plan = ParallelPlan(ep_size=ep_size, dp_size=world_size // ep_size)
        text = megatron_args(plan, spec, config, MegatronOptions("local"))
        (folder / f"ep{ep_size}.args").write_text(text)
    return model


def load_converted(
    folder: Path,
    ep_size: int = 1,
    *more: str,
    rank: int = 0,
    world_size: int = 1,
    words: Sequence[str] | None = None,
) -> Any:
    """Builds the model of a case in Megatron, and loads its checkpoint.

    Args:
        folder: What `save_converted` has written.
        ep_size: Number of ranks that share the experts; Megatron's groups are of this size.
        *more: Arguments that come after the generated ones.
        rank: This rank.
        world_size: Number of ranks.
        words: Arguments in place of the generated ones.
    """
    words = words or read_arguments(folder / f"ep{ep_size}.args")
    args = parse_arguments([*words, *more], rank=rank, world_size=world_size)
    model = build_model(args, torch.device("cpu"))
    load_weights(model, open_torch_dist(folder / "checkpoint"))
    return model
