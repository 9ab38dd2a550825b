"""One scoring job in Megatron's GPTModel, from options to outputs, as each rank runs it.

prepare (all that can be refused before a model is built) -> load -> passes -> gather -> write.
"""

from __future__ import annotations

import importlib.util
import logging
import time
import warnings
from argparse import Namespace
from dataclasses import dataclass

from ds_moe_ep.checkpoint.megatron.stored import TorchDist, open_torch_dist
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.console import progress_bar
from ds_moe_ep.engine.encode import check_tokens, encode, read_tokenizer
from ds_moe_ep.engine.outputs import ScoreResult, write_results
from ds_moe_ep.engine.prompts import read_prompts
from ds_moe_ep.engine.supervisor import Progress
from ds_moe_ep.engine.tasks import EncodedPrompt
from ds_moe_ep.engine.together import run_together
from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.arguments import parse_arguments, read_arguments
from ds_moe_ep.megatron.model import build_model, load_weights, start_model_parallel
from ds_moe_ep.megatron.options import MegatronJobOptions
from ds_moe_ep.megatron.score import plan_passes, score_pass
from ds_moe_ep.megatron.stand_ins import import_megatron, megatron_stand_ins
from ds_moe_ep.whole_file import check_writable

__all__ = ["run_megatron_job"]

_DTYPE_FLAGS = {"float32": [], "bfloat16": ["--bf16"], "float16": ["--fp16"]}


def run_megatron_job(options: MegatronJobOptions, progress: Progress) -> int:
    """Runs the job on this rank.

    Args:
        options: What the user asked for.
        progress: Told where this rank is.

    Returns:
        The exit code. On rank 0 a summary was printed, or by one rank why the job broke.
    """
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(megatron|torch\.distributed)\.")

    def work(job: Job) -> None:
        progress.enter("importing Megatron")
        job.all_or_none(import_megatron, what="importing Megatron", timeout_s=options.timeout_s)
        with megatron_stand_ins("cpu" if job.device.type == "cpu" else None):
            _run_joined(options, job, progress)

    return run_together(work, options, progress, None)


@dataclass(frozen=True)
class _Work:
    """What a rank has settled before it builds a model."""

    args: Namespace
    stored: TorchDist
    prompts: list[EncodedPrompt]


def _run_joined(options: MegatronJobOptions, job: Job, progress: Progress) -> None:
    """Runs the job once the ranks have met."""
    progress.enter("reading the input")
    work = job.all_or_none(
        lambda: _prepare(options, job), what="reading the input", timeout_s=options.timeout_s
    )
    progress.enter("building the model")
    start_model_parallel(work.args, timeout_s=options.timeout_s)
    model = job.all_or_none(
        lambda: build_model(work.args, job.device),
        what="building the model",
        timeout_s=options.start_timeout_s,
    )
    progress.enter("loading weights")
    job.all_or_none(
        lambda: load_weights(model, work.stored),
        what="loading weights",
        timeout_s=options.start_timeout_s,
    )
    job.wait_for_all(options.timeout_s, "starting the first pass")
    start = time.perf_counter()
    results = _score(options, job, work, model, progress)
    progress.enter("writing the results")
    _finish(options, job, work, results, time.perf_counter() - start)


def _prepare(options: MegatronJobOptions, job: Job) -> _Work:
    """Reads and checks all that the job needs but the weights."""
    args = _parse(options, job)
    stored = open_torch_dist(options.load)
    if job.info.rank == 0:
        check_writable(options.output)
    prompts = read_prompts(options.input)
    tokenizer = read_tokenizer(options.tokenizer or options.load, prompts, options.input)
    encoded = encode(prompts, tokenizer)
    check_tokens(
        encoded,
        source=options.input,
        model=options.args,
        vocab_size=args.padded_vocab_size,
        context_length=args.max_position_embeddings,
    )
    return _Work(args, stored, encoded)


def _parse(options: MegatronJobOptions, job: Job) -> Namespace:
    """Has Megatron take the file of arguments, with those that the user gave in their place."""
    words = read_arguments(options.args)
    if options.dtype is not None:
        words = [word for word in words if word not in ("--bf16", "--fp16")]
        words += _DTYPE_FLAGS[options.dtype]
    if options.ep_size is not None:
        words += ["--expert-model-parallel-size", str(options.ep_size)]
    if options.dispatcher is not None:
        words += ["--moe-token-dispatcher-type", options.dispatcher]
    try:
        args = parse_arguments(words, rank=job.info.rank, world_size=job.info.world_size)
    except MegatronError as error:
        raise MegatronError(f"{options.args}: {error}") from error
    _check_arguments(args, options, job)
    return args


def _check_arguments(args: Namespace, options: MegatronJobOptions, job: Job) -> None:
    """Refuses arguments that Megatron takes and this job cannot run with."""
    for part in ("tensor-model", "pipeline-model", "context"):
        flag = f"--{part}-parallel-size"
        size = getattr(args, flag[2:].replace("-", "_"))
        if size != 1:
            raise MegatronError(
                f"{flag} {size} in {options.args}: prompts are scored whole, with experts spread "
                "over ranks and all else on each. Set it to 1: `ds-moe-ep config --tp 1 --pp 1` "
                "writes such a file."
            )
    if args.padded_vocab_size is None:
        raise MegatronError(
            f"{options.args} has no --padded-vocab-size, the rows of the embedding."
        )
    if args.transformer_impl == "local":
        return
    if job.device.type == "cpu" or importlib.util.find_spec("transformer_engine") is None:
        raise MegatronError(
            f"--transformer-impl {args.transformer_impl} in {options.args}: Transformer Engine "
            "needs a GPU and has to be installed. Write the file with `ds-moe-ep config "
            "--megatron-transformer-impl local`, and convert for --target-spec local."
        )


def _score(
    options: MegatronJobOptions, job: Job, work: _Work, model: object, progress: Progress
) -> dict[int, ScoreResult]:
    """Goes through the passes of this rank; returns its results by index in the input."""
    passes_of = plan_passes(
        [len(each.token_ids) for each in work.prompts],
        job.info.world_size,
        options.batch_size,
        same_shape=work.args.moe_token_dispatcher_type == "allgather",
    )
    own = passes_of[job.info.rank]
    results: dict[int, ScoreResult] = {}
    finished = 0
    with progress_bar(len(work.prompts)) as show:
        for number, each in enumerate(own, start=1):
            progress.enter(f"pass {number} of {len(own)}")
            progress.start_step(number)
            scored = score_pass(model, each, work.prompts, job.device)
            results |= zip(each.indices, scored, strict=True)
            finished += sum(len(passes[number - 1].indices) for passes in passes_of)
            if show is not None:
                show(finished)
    return results


def _finish(
    options: MegatronJobOptions,
    job: Job,
    work: _Work,
    results: dict[int, ScoreResult],
    run_s: float,
) -> None:
    """Brings the results of all ranks into one file, and tells how it went."""
    gathered = job.gather(results)

    def write() -> None:
        if job.info.rank != 0:
            return
        by_index = {index: result for own in gathered for index, result in own.items()}
        write_results(options.output, [by_index[i] for i in range(len(work.prompts))])
        num_tokens = sum(len(each.token_ids) for each in work.prompts)
        print(
            f"scored {len(by_index):,} prompts ({num_tokens:,} tokens) in {run_s:.1f} s with "
            f"Megatron's GPTModel on {job.info.world_size} ranks, experts over "
            f"{work.args.expert_model_parallel_size}: {options.output}",
            flush=True,
        )

    job.all_or_none(write, what="writing the results", timeout_s=options.timeout_s)
