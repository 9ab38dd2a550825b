"""Builds Megatron's GPTModel from its arguments, and fills it from a checkpoint.

Megatron's own classes do both. Call everything within `megatron_stand_ins`, on all ranks.
"""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

import torch
from torch.distributed.checkpoint.api import CheckpointException

from ds_moe_ep.errors import CheckpointError, MegatronError, some
from ds_moe_ep.megatron.arguments import reason_of

if TYPE_CHECKING:  # it brings transformers, which building a model takes no part in
    from ds_moe_ep.checkpoint.megatron.stored import TorchDist

__all__ = ["build_model", "load_weights", "start_model_parallel"]

_RIGHT_PAIR = (
    "Give the arguments that `ds-moe-ep config` writes for this model. With --transformer-impl "
    "local a checkpoint has to be converted for --target-spec local, else for te."
)


def start_model_parallel(args: Namespace, *, timeout_s: float) -> None:
    """Makes Megatron's process groups; torch.distributed is there already.

    Args:
        args: What `parse_arguments` has returned.
        timeout_s: How long any wait in them may last.
    """
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=args.tensor_model_parallel_size,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    # Attention enters it for its dropout, also where there is none.
    initialize_rng_tracker(inference_rng_tracker=True)


def build_model(args: Namespace, device: torch.device) -> torch.nn.Module:
    """Builds the GPTModel that the arguments describe, with this rank's experts and no values.

    Args:
        args: What `parse_arguments` has returned.
        device: Where its tensors are to live.

    Returns:
        The model, in evaluation mode.

    Raises:
        MegatronError: Megatron refuses it; with its own words.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.module import Float16Module
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.models.gpt import GPTModelBuilder

    args.perform_initialization = False
    try:
        config = gpt_config_from_args(args)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = GPTModelBuilder(config).build_model(groups)
    except Exception as error:  # of any kind: mostly assertions and ValueErrors
        raise MegatronError(f"Megatron cannot build this model: {reason_of(error)}") from error
    if args.bf16 or args.fp16:
        model = Float16Module(config.transformer, model)
    return model.to(device).eval()


def load_weights(model: torch.nn.Module, stored: TorchDist) -> None:
    """Fills a model from a checkpoint in torch_dist format, by Megatron's own loading.

    Args:
        model: What `build_model` has returned.
        stored: What `open_torch_dist` has returned, which has read the checkpoint's list of tensors
            without running what is in it: Megatron unpickles it.

    Raises:
        CheckpointError: It is not whole, or is not of this model.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.transformer.module import Float16Module

    own = model.module if isinstance(model, Float16Module) else model
    try:
        state, left_over, lacking = dist_checkpointing.load(
            {"model": own.sharded_state_dict()}, str(stored.folder), strict="return_all"
        )
    except (Exception, CheckpointException) as error:  # of any kind, from Megatron or torch
        raise CheckpointError(
            f"{stored.folder}: Megatron cannot load it into the model of these arguments: "
            f"{reason_of(error)}. {_RIGHT_PAIR}"
        ) from error
    # Objects of modules without state are empty; which have one depends on versions.
    lacking = {key for key in lacking if not key.endswith("_extra_state")}
    left_over = {key for key in left_over if key in stored.shapes and _is_of_a_model(key)}
    if lacking or left_over:
        what = "lacks" if lacking else "has, beside what the model of these arguments has,"
        names = sorted(lacking or left_over)
        raise CheckpointError(f"{stored.folder} {what} {some(names)}. {_RIGHT_PAIR}")
    own.load_state_dict(state["model"], strict=False)  # but for these objects it has it all


def _is_of_a_model(key: str) -> bool:
    """Returns whether a tensor is a weight, and not the optimizer's."""
    return key.startswith(("embedding.", "decoder.", "output_layer."))
