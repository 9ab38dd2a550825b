"""Checks of Megatron arguments that Megatron leaves out, or makes only once its ranks are running.

Whether they describe a certain Hugging Face model is decided in config/.
"""

from argparse import Namespace
from collections.abc import Iterator

__all__ = ["own_problems"]


def own_problems(args: Namespace, world_size: int) -> list[str]:
    """Returns what is wrong, a sentence each with its numbers and the way out.

    Args:
        args: What Megatron's parser returned, before or after validation.
        world_size: Number of ranks they are for.
    """
    return [*_sizes(args, world_size), *_model(args)]


def _sizes(args: Namespace, world_size: int) -> Iterator[str]:
    tp_size, pp_size = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp_size, ep_size = args.context_parallel_size, args.expert_model_parallel_size
    etp_size = args.expert_tensor_parallel_size or tp_size
    if min(tp_size, pp_size, cp_size, ep_size, etp_size) < 1:
        yield "Every parallel size is at least 1."
        return
    dense = tp_size * pp_size * cp_size
    if world_size % dense:
        yield (
            f"--tensor-model-parallel-size {tp_size} * --pipeline-model-parallel-size {pp_size} * "
            f"--context-parallel-size {cp_size} = {dense} does not divide {world_size} ranks."
        )
    experts = etp_size * ep_size * pp_size
    if world_size % experts:
        fitting = _divisors(world_size // pp_size) if world_size % pp_size == 0 else [1]
        fitting = [size for size in fitting if world_size % (size * etp_size * pp_size) == 0]
        yield (
            f"--expert-model-parallel-size {ep_size} * --expert-tensor-parallel-size {etp_size} * "
            f"--pipeline-model-parallel-size {pp_size} = {experts:,} does not divide {world_size} "
            "ranks. "
            + (
                f"With the other sizes as they are, use --expert-model-parallel-size in {fitting}."
                if fitting
                else "Use smaller ones."
            )
        )
    if args.num_experts and args.num_experts % ep_size:
        yield (
            f"--expert-model-parallel-size {ep_size} does not divide --num-experts "
            f"{args.num_experts}: use one of {_divisors(args.num_experts)}."
        )


def _model(args: Namespace) -> Iterator[str]:
    if args.num_experts and args.moe_router_topk > args.num_experts:
        yield (
            f"--moe-router-topk {args.moe_router_topk} is more than --num-experts "
            f"{args.num_experts}: use at most that."
        )
    heads, groups = args.num_attention_heads, args.num_query_groups
    if args.group_query_attention and heads and groups and heads % groups:
        yield (
            f"--num-query-groups {groups} does not divide --num-attention-heads {heads}: use one "
            f"of {_divisors(heads)}."
        )
    pattern = args.moe_layer_freq
    if isinstance(pattern, list) and args.num_layers and len(pattern) != args.num_layers:
        yield (
            f"--moe-layer-freq has {len(pattern)} layers, --num-layers is {args.num_layers}: give "
            "it one item for each layer."
        )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
