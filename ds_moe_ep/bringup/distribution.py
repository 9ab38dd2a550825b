"""Phase 3: prompts are spread by what they were measured to cost; dispatcher and batch size.

Results do not depend on any of it: tokens are drawn by a prompt's id, and rows are not dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.balance import balancedness
from ds_moe_ep.bringup.report import PASS, WARN, Check
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.decoding import without_own_settings
from ds_moe_ep.engine.prompts import Prompt
from ds_moe_ep.engine.schedule import Batch
from ds_moe_ep.engine.tasks import EncodedPrompt, GenerateSettings, generate_batch
from ds_moe_ep.moe.auto import Auto
from ds_moe_ep.moe.layer import ExpertParallelMoE

__all__ = [
    "WorkCost",
    "balance_of_schedule",
    "check_balance",
    "check_dispatcher",
    "choose_dispatcher",
    "measure_cost",
]

TARGET_BALANCE = 0.9
"""The least that the mean load of the ranks should be of the highest."""

_SHORT, _LONG = 4, 36
_STEPS = 3
_ROUNDS = 3
_ROWS = 4
# Beyond these bounds a measurement was disturbed.
_LEAST_COST, _MOST_COST = 0.05, 1000.0


@dataclass(frozen=True)
class WorkCost:
    """What serving a prompt costs, measured on the loaded model.

    Attributes:
        prompt_token_ms: A token of a prompt.
        new_token_ms: A token that is generated, its share of a decode step.
    """

    prompt_token_ms: float
    new_token_ms: float

    @property
    def new_token_cost(self) -> float:
        """A new token's cost, in tokens of a prompt; 1 if the measurement says nothing."""
        if self.prompt_token_ms <= 0.0 or self.new_token_ms <= 0.0:
            return 1.0
        cost = self.new_token_ms / self.prompt_token_ms
        return round(min(max(cost, _LEAST_COST), _MOST_COST), 2)


def measure_cost(
    job: Job, engine: Any, layers: Sequence[ExpertParallelMoE], context_length: int, vocab_size: int
) -> WorkCost | None:
    """Times a few passes of the loaded model; all ranks call it, and get rank 0's figures.

    Args:
        job: The job.
        engine: What ``deepspeed.init_inference`` returned.
        layers: Its MoE layers.
        context_length: Tokens a prompt and its completion may have together.
        vocab_size: Token ids there are.

    Returns:
        None where the context is too short to tell.
    """
    if context_length < _LONG + _STEPS:
        return None

    def seconds(prompt_tokens: int, new_tokens: int) -> float:
        prompts = [
            EncodedPrompt(
                Prompt(str(row), None, None),
                tuple((row * 31 + place * 7) % vocab_size for place in range(prompt_tokens)),
            )
            for row in range(_ROWS)
        ]
        settings = GenerateSettings(new_tokens, context_length)
        start_s = time.perf_counter()
        generate_batch(engine, prompts, settings, None)
        return time.perf_counter() - start_s

    with _same_pass_on_all_ranks(engine.module, layers, job.info.world_size):
        kinds = (_SHORT, 1), (_LONG, 1), (_SHORT, _STEPS)
        rounds = [[seconds(*kind) for kind in kinds] for _ in range(_ROUNDS)]
        # The first is slower, and other work on the machine only ever adds.
        short_s, long_s, steps_s = (min(each) for each in zip(*rounds[1:], strict=True))
    own = WorkCost(
        (long_s - short_s) / (_LONG - _SHORT) / _ROWS * 1e3,
        (steps_s - short_s) / (_STEPS - 1) / _ROWS * 1e3,
    )
    return job.all_gather(own)[0]


@contextmanager
def _same_pass_on_all_ranks(
    model: Any, layers: Sequence[ExpertParallelMoE], world_size: int
) -> Iterator[None]:
    """Announces passes that bring as many tokens on every rank, and forgets what they counted.

    Nothing of the model's own decoding is followed: by end tokens ranks whose rounding differs
    would have other numbers of passes, and wait for each other.
    """

    def announce(module: Any, args: Any, kwargs: Any) -> None:
        for layer in layers:
            layer.announce([kwargs["input_ids"].numel()] * world_size)

    hook = model.register_forward_pre_hook(announce, with_kwargs=True)
    try:
        with without_own_settings(model):
            yield
    finally:
        hook.remove()
        for layer in layers:
            layer.announce(None)
            layer.forget_counts()


def balance_of_schedule(
    schedule: Sequence[Sequence[Batch]], cost_of: Callable[[int], float]
) -> float:
    """Returns the mean load of the ranks over the highest: 1 is perfect.

    Args:
        schedule: The batches of each rank.
        cost_of: The cost of a prompt, by its index.
    """
    loads = [
        sum(cost_of(index) for batch in batches for index in batch.indices) for batches in schedule
    ]
    return balancedness(loads)


def check_balance(share: float, num_prompts: int, num_ranks: int, cost: WorkCost | None) -> Check:
    """Judges how evenly prompts are spread.

    Args:
        share: What `balance_of_schedule` says.
        num_prompts: Prompts to serve.
        num_ranks: Ranks that share them.
        cost: What was measured; None if work was estimated by tokens.
    """
    if cost is None:
        by = "their tokens (a batch a rank, or a short context: nothing to measure)"
    elif cost.prompt_token_ms <= 0.0 or cost.new_token_ms <= 0.0:
        by = "their tokens: what one costs is too little to tell"
    else:
        by = (
            f"measured cost: {cost.prompt_token_ms:.3g} ms a prompt token, "
            f"{cost.new_token_ms:.3g} ms a new one"
        )
    text = f"{num_prompts:,} on {num_ranks} ranks by {by}; predicted mean/max {share:.3f}"
    if share >= TARGET_BALANCE:
        return Check("prompts", PASS, text, round(share, 4), TARGET_BALANCE)
    why = "Too few prompts for so many ranks, or some are much longer than the others"
    return Check("prompts", WARN, f"{text}. {why}", round(share, 4), TARGET_BALANCE)


def choose_dispatcher(
    layer: ExpertParallelMoE, num_rows: int, top_k: int, *, has_static_shapes: bool = False
) -> tuple[str, dict[str, float]]:
    """Returns what a pass is dispatched by, and the predicted seconds of each that ``auto`` has.

    Args:
        layer: A layer with its expert group.
        num_rows: Tokens of each rank in the pass.
        top_k: Experts of each.
        has_static_shapes: Whether the pass is replayed.
    """
    experts = layer.deepspeed_moe
    if not isinstance(experts.dispatcher, Auto):
        return experts.describe_dispatch(), {}
    row_bytes = layer.hidden_size * next(experts.experts.parameters()).element_size()
    num_tokens_W = [num_rows] * experts.dispatcher.prices.flat.size
    return experts.dispatcher.choose(
        top_k, row_bytes, num_tokens_W, has_static_shapes=has_static_shapes
    )


def check_dispatcher(
    layer: ExpertParallelMoE,
    num_rows: int,
    top_k: int,
    asked: str,
    *,
    has_static_shapes: bool = False,
) -> Check:
    """Tells which dispatcher serves a decode step, and what the others are predicted to take.

    Args:
        layer: One of the MoE layers.
        num_rows: Tokens of each rank in a decode step.
        top_k: Experts of each.
        asked: The dispatcher that the user named, or ``auto``.
        has_static_shapes: Whether decode passes are replayed.
    """
    chosen, predicted_s = choose_dispatcher(
        layer, num_rows, top_k, has_static_shapes=has_static_shapes
    )
    if not predicted_s:
        why = "replicated batches use it" if asked == "auto" else "as asked for"
        if layer.ep_size == 1:
            why = "one rank a group, nothing travels"
        return Check("dispatcher", PASS, f"{chosen}: {why}")
    each = ", ".join(f"{name} {s * 1e3:.3g}" for name, s in predicted_s.items())
    return Check(
        "dispatcher",
        PASS,
        f"{chosen} for decode steps of {num_rows} rows a rank, chosen "
        f"{'once, as the pass is captured' if has_static_shapes else 'anew for each pass'} "
        f"(predicted ms a layer: {each})",
    )
