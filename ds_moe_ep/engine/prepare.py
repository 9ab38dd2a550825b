"""All that can be refused before a weight is read: plan, settings, files, prompts, outputs.

Every rank runs it and gets the same answer, so that all can be refused together; it starts no
collective.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ds_moe_ep.adapter import adapt, moe_layers
from ds_moe_ep.checkpoint.files import open_checkpoint
from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config
from ds_moe_ep.config.deepspeed import inference_config
from ds_moe_ep.config.placement_file import check_placement, read_placement
from ds_moe_ep.config.run import RunConfig, load_run_config
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.dist.node_groups import ranks_per_node
from ds_moe_ep.engine.decode_graph import check_replayable
from ds_moe_ep.engine.encode import check_tokens, encode, read_tokenizer
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.prompts import Prompt, read_prompts
from ds_moe_ep.engine.tasks import EncodedPrompt
from ds_moe_ep.errors import ConfigError, PlanError
from ds_moe_ep.hostfile import local_cluster
from ds_moe_ep.model_spec import ModelSpec, read_model_spec
from ds_moe_ep.moe.dispatch import STATIC_SHAPES, TWO_LEVEL
from ds_moe_ep.placement import SlotPlacement
from ds_moe_ep.plan import ParallelPlan, make_plan
from ds_moe_ep.whole_file import check_writable

__all__ = ["Work", "prepare", "replays_passes"]

# Of a preflight without an input.
_LONGEST_MADE_UP, _BATCHES_MADE_UP, _ROWS_MADE_UP = 512, 3, 8


@dataclass(frozen=True)
class Work:
    """What a rank has settled before it reads a weight.

    Attributes:
        plan: The parallel sizes.
        spec: The model.
        deepspeed_config: What ``deepspeed.init_inference`` takes.
        dtype: What the weights are held in.
        tokenizer: The model's; None if it has none and no prompt needs one.
        prompts: All prompts of the job, in input order.
        context_length: Tokens a prompt and its completion may have together.
        placement: Experts in slots; None if they are contiguous.
        monitor_config: The sections of the DeepSpeed JSON for DeepSpeed's monitor, by name.
    """

    plan: ParallelPlan
    spec: ModelSpec
    deepspeed_config: dict[str, Any]
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None
    prompts: list[EncodedPrompt]
    context_length: int
    placement: SlotPlacement | None = None
    monitor_config: dict[str, Any] = field(default_factory=dict)


def prepare(options: JobOptions, job: Job) -> Work:
    """Reads and checks all that the job needs but the weights.

    Raises:
        DsMoeEpError: Something is refused.
    """
    spec = read_model_spec(options.model)
    config = load_run_config(options.config) if options.config else None
    plan = _plan(options, config, spec, job.info.world_size)
    placement = _placement(options, plan, spec)
    settings = _deepspeed_config(options, config, plan, spec, job.device)
    _check_dispatcher(options, plan, job)
    dtype = getattr(torch, settings["dtype"])
    model_config = read_model_config(options.model)
    open_checkpoint(options.model)
    if replays_passes(options):
        _check_passes(model_config, plan, placement, dtype)
    if job.info.rank == 0:
        if not options.preflight:
            check_writable(options.output)
        _warn_ignored(options)
    context_length = min(spec.max_position_embeddings, settings["max_out_tokens"])
    if options.input is None:
        prompts = _made_up(options, spec, context_length, job.info.world_size)
    else:
        prompts = read_prompts(options.input)
    tokenizer = read_tokenizer(options.model, prompts, options.input)
    encoded = encode(prompts, tokenizer)
    check_tokens(
        encoded,
        source=options.input,
        model=options.model,
        vocab_size=spec.vocab_size,
        context_length=context_length,
        generates=options.task == "generate",
    )
    return Work(
        plan,
        spec,
        settings,
        dtype,
        tokenizer,
        encoded,
        context_length,
        placement,
        config.monitor if config else {},
    )


def replays_passes(options: JobOptions) -> bool:
    """Says whether decode passes are to be replayed, and there are any.

    A completion's first token is the prompt's pass's; each further one has a decode pass.
    """
    return options.cuda_graphs and options.task == "generate" and options.max_new_tokens > 1


def _plan(
    options: JobOptions, config: RunConfig | None, spec: ModelSpec, world_size: int
) -> ParallelPlan:
    """Fits the ranks that were started to what the user and the configuration ask for."""
    configured = None
    if config is not None:
        _check_config(options, config, spec, world_size)
        configured = config.ep_size
    ep_size = options.ep_size or configured or world_size
    ranks = replace(local_cluster(world_size), source="the ranks of this job")
    return make_plan(ranks, spec, ep_size=ep_size, dp_size=max(1, world_size // ep_size))


def _placement(options: JobOptions, plan: ParallelPlan, spec: ModelSpec) -> SlotPlacement | None:
    if options.placement is None:
        return None
    placement = read_placement(options.placement)
    check_placement(placement, plan, spec, options.placement)
    return placement


def _check_config(options: JobOptions, config: RunConfig, spec: ModelSpec, world_size: int) -> None:
    if config.plan is not None and config.plan.world_size != world_size:
        planned = config.plan.world_size
        raise PlanError(
            f"{config.source} plans {config.plan} for {planned} ranks, but this job has "
            f"{world_size}. Start {planned} ranks (deepspeed --hostfile ...), or write the files "
            f"for {world_size}: ds-moe-ep config --model M --hostfile H --out DIR."
        )
    if options.ep_size and config.ep_size and options.ep_size != config.ep_size:
        raise PlanError(
            f"--ep-size {options.ep_size} contradicts ep_size={config.ep_size} of "
            f"{config.source}. Leave one of them out."
        )
    if config.num_experts not in (None, spec.num_experts):
        raise ConfigError(
            f"{config.source} was made for {config.num_experts} experts a layer, {options.model} "
            f"has {spec.num_experts}. Write it again with ds-moe-ep config for this model."
        )


def _check_dispatcher(options: JobOptions, plan: ParallelPlan, job: Job) -> None:
    if options.dispatcher == "allreduce" and options.batch_mode == "sharded":
        raise ConfigError(
            "--dispatcher allreduce sums over ranks what each computed for the same tokens, but "
            "--batch-mode sharded gives each rank prompts of its own. Add --batch-mode replicated, "
            "or use --dispatcher auto, alltoall or allgather."
        )
    if options.cuda_graphs and options.dispatcher not in ("auto", *STATIC_SHAPES):
        raise ConfigError(
            f"--cuda-graphs needs passes of one shape, but with --dispatcher {options.dispatcher} "
            "shapes follow from the routing. Use --dispatcher auto or allgather, or leave "
            "--cuda-graphs out."
        )
    if options.dispatcher in TWO_LEVEL and ranks_per_node(plan.ep_size, job.nodes) is None:
        flat = options.dispatcher.removesuffix("-2level")
        raise ConfigError(
            f"--dispatcher {options.dispatcher} needs several hosts with as many ranks on each, "
            f"two at least, in every expert group; the {job.info.world_size} ranks of this job, "
            f"with ep_size={plan.ep_size}, are on {len(set(job.nodes))}. Use --dispatcher {flat}."
        )


def _check_passes(
    config: PreTrainedConfig,
    plan: ParallelPlan,
    placement: SlotPlacement | None,
    dtype: torch.dtype,
) -> None:
    """Refuses --cuda-graphs for a model whose decode passes a graph cannot hold."""
    model = build_on_meta(config, dtype)
    adapt(model, plan, ep_rank=0, placement=placement)  # experts are alike on all ranks
    check_replayable(model, moe_layers(model))


def _deepspeed_config(
    options: JobOptions,
    config: RunConfig | None,
    plan: ParallelPlan,
    spec: ModelSpec,
    device: torch.device,
) -> dict[str, Any]:
    """The given or generated configuration; float32 on a CPU unless a dtype was named."""
    named = options.dtype or (config.dtype if config else None)
    settings = inference_config(
        plan, spec, dtype=named or ("float32" if device.type == "cpu" else None)
    )
    if config:
        settings |= config.inference | {"dtype": settings["dtype"]}
        settings["moe"] = {**settings["moe"], "ep_size": plan.ep_size}
    return settings


def _warn_ignored(options: JobOptions) -> None:
    if options.temperature == 0.0 and options.top_p < 1.0:
        warnings.warn("--top-p is ignored: --temperature 0 is greedy decoding.", stacklevel=2)
    if options.cuda_graphs and not replays_passes(options):
        why = "--task score" if options.task == "score" else "--max-new-tokens 1"
        warnings.warn(f"--cuda-graphs is ignored: {why} has no decode passes.", stacklevel=2)


def _made_up(
    options: JobOptions, spec: ModelSpec, context_length: int, world_size: int
) -> list[Prompt]:
    """Makes prompts of uneven lengths, a few batches for each rank."""
    new_tokens = options.max_new_tokens if options.task == "generate" else 0
    longest = min(max(1, context_length - max(1, new_tokens)), _LONGEST_MADE_UP)
    count = _BATCHES_MADE_UP * (options.batch_size or _ROWS_MADE_UP) * world_size
    return [
        Prompt(str(i), None, tuple((i + j) % spec.vocab_size for j in range(1 + i % longest)))
        for i in range(count)
    ]
