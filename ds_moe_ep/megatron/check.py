"""What Megatron itself says of arguments and a number of ranks, for every rank in one process.

Its parser, its validation, its configuration of the model, its process groups (over torch's fake
ranks) and its model (without memory). Beside it stand our own checks of what it does not look at.
"""

import contextlib
import io
import logging
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from unittest import mock

from ds_moe_ep.errors import MegatronError
from ds_moe_ep.megatron.arguments import as_command_line, one_parser, read_arguments, reason_of
from ds_moe_ep.megatron.check_report import OWN_CHECKS, STAGES, CheckReport, GroupSizes
from ds_moe_ep.megatron.own_checks import own_problems
from ds_moe_ep.megatron.ownership import RankPart, rank_part
from ds_moe_ep.megatron.stand_ins import megatron_stand_ins

__all__ = ["check_arguments"]

T = TypeVar("T")


class _RefusedError(Exception):
    """A stage has failed; the report says which."""


def check_arguments(file: Path, world_size: int, ranks: Iterable[int] | None = None) -> CheckReport:
    """Asks Megatron about an argument file, for each rank.

    Args:
        file: The arguments, as `ds-moe-ep config` writes them.
        world_size: Number of ranks they are for.
        ranks: Those to ask for; by default all.

    Raises:
        MegatronError: megatron-core is not there, or the file cannot be read.
    """
    words = read_arguments(file)
    if world_size < 1:
        raise MegatronError(f"--world {world_size}: at least 1 is needed.")
    if any(word.partition("=")[0] == "--yaml-cfg" for word in words):
        raise MegatronError(f"--args {file}: --yaml-cfg is not followed. Give the arguments here.")
    report = CheckReport(world_size)
    with megatron_stand_ins("meta"), _quiet(), one_parser():
        try:
            for rank in range(world_size) if ranks is None else ranks:
                _check_rank(words, rank, report)
        except _RefusedError:
            report.ranks.clear()
    return report


def _check_rank(words: Sequence[str], rank: int, report: CheckReport) -> None:
    """Goes through all stages for one rank.

    Raises:
        _RefusedError: One of them failed.
    """
    from megatron.training import arguments

    def stage(name: str, ask: Callable[[], T]) -> T:
        return _ask(report, name, rank, ask)

    # Whoever splits tensors on GPUs older than Blackwell has to set it; a launcher does.
    with (
        mock.patch.dict("os.environ", CUDA_DEVICE_MAX_CONNECTIONS="1"),
        as_command_line(words, rank, report.world_size) as said,
    ):
        args = stage("parse_args", lambda: _parse(said))
        if not report.ranks and (problems := own_problems(args, report.world_size)):
            report.problems[OWN_CHECKS] = " ".join(problems)
        stage("validate_args", lambda: arguments.validate_args(args))
    _leave_out_fused_kernels(args)
    stage(
        "core_transformer_config_from_args",
        lambda: arguments.core_transformer_config_from_args(args),
    )
    with _fake_ranks(rank, report.world_size):
        report.sizes = stage("initialize_model_parallel", lambda: _groups(args))
        report.ranks.append(stage("GPTModel", lambda: _part(args, rank)))


def _ask(report: CheckReport, stage: str, rank: int, ask: Callable[[], T]) -> T:
    """Returns what a stage returns, or writes down what it raised."""
    try:
        return ask()
    except (Exception, SystemExit) as error:  # of any kind: mostly assertions and RuntimeErrors
        where = f"[rank {rank}] " if rank else ""
        kind, reason = type(error).__name__, reason_of(error)
        is_plain = isinstance(error, MegatronError) or reason == kind
        report.problems[stage] = where + (reason if is_plain else f"{kind}: {reason}")
        report.not_reached = STAGES[STAGES.index(stage) + 1 :]
        raise _RefusedError from error


def _parse(said: io.StringIO) -> Namespace:
    from megatron.training import arguments

    try:
        return arguments.parse_args()
    except SystemExit:  # argparse's way to refuse; its last line says why
        last_line = said.getvalue().strip().rpartition("\n")[2]
        raise MegatronError(last_line[last_line.find("error: ") :]) from None


def _leave_out_fused_kernels(args: Namespace) -> None:
    """Turns off what the configuration refuses on a machine without Transformer Engine."""
    args.apply_rope_fusion = False
    args.moe_permute_fusion = False


def _groups(args: Namespace) -> GroupSizes:
    from megatron.core import parallel_state

    from ds_moe_ep.megatron.model import start_model_parallel

    start_model_parallel(args, timeout_s=60)
    return GroupSizes(
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
        parallel_state.get_expert_data_parallel_world_size(),
    )


def _part(args: Namespace, rank: int) -> RankPart:
    """Returns what a rank holds, by a model of Megatron's local layers: sizes are the same."""
    import torch

    from ds_moe_ep.megatron.model import build_model

    args.transformer_impl = "local"
    args.moe_grouped_gemm = False
    args.no_persist_layer_norm = True
    args.gradient_accumulation_fusion = False
    args.masked_softmax_fusion = False
    args.sequence_parallel = False
    if args.multi_latent_attention:
        # Tables of stretched positions take long to make, and have no parameters.
        args.rope_type = "rope"
        args.spec = args.spec or ["ds_moe_ep.megatron.layer_specs", "mla_layers"]
    meta = torch.device("meta")
    with meta:  # Megatron makes routers' weights on the CPU, whatever it is told
        model = build_model(args, meta)
    return rank_part(model, rank)


@contextlib.contextmanager
def _fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Makes this process one rank of many: collectives return at once and carry nothing."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what Megatron says of a machine without GPUs and of its own future."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
