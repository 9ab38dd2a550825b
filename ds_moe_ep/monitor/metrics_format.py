"""What stands in the files of a metrics folder: their names, and the keys of each line.

The name of bringup.jsonl is with the bring-up, which writes it. The format is described in
docs/metrics.md.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from ds_moe_ep.config.plan_file import SizesSection
from ds_moe_ep.config.strict import Strict

__all__ = [
    "BALANCE_JSONL",
    "EXPERTS_JSONL",
    "PARTS",
    "PASS_KINDS",
    "RANKS_JSONL",
    "RUN_JSON",
    "SAMPLES_JSONL",
    "VERSION",
    "BalanceWindow",
    "BringUpCheck",
    "BringUpPhase",
    "Collective",
    "ExpertLoads",
    "Quantiles",
    "RankMetrics",
    "RankPlace",
    "Run",
    "Sample",
]

VERSION = 2

RUN_JSON = "run.json"
SAMPLES_JSONL = "samples.jsonl"
BALANCE_JSONL = "balance.jsonl"
EXPERTS_JSONL = "experts.jsonl"
RANKS_JSONL = "metrics.jsonl"

PASS_KINDS = ("prefill", "decode")
PARTS = ("attention", "router", "dispatch", "experts", "combine", "other")


def _with_offset(text: str) -> str:
    if datetime.fromisoformat(text).tzinfo is None:
        raise ValueError("a moment with its offset is needed, like 2026-11-25T09:00:00+00:00")
    return text


# Utilisation is a share too, but one that is measured with two clocks may be a little over 1.
_Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Moment = Annotated[str, AfterValidator(_with_offset)]


class Run(Strict):
    """What was run: run.json.

    Attributes:
        hosts: The host of each rank.
        device: ``cpu``, or the name of the GPUs.
        predicted_memory_bytes: Of a rank, as the bring-up predicted it; None if it did not.
        available_memory_bytes: What a rank has of its device's memory; None if that is not known.
        slots_per_rank: Slots for experts of a layer on a rank that `--placement` filled; None where
            experts are contiguous.
    """

    version: Literal[2]
    command: list[str]
    started_at: _Moment
    model: str
    model_type: str
    plan: SizesSection
    task: Literal["generate", "score"]
    dtype: str
    dispatcher: str
    batch_mode: Literal["sharded", "replicated"]
    hosts: Annotated[list[str], Field(min_length=1)]
    device: str
    versions: dict[str, str]
    moe_layers: Annotated[list[NonNegativeInt], Field(min_length=1)]
    num_experts: PositiveInt
    top_k: PositiveInt
    predicted_memory_bytes: PositiveInt | None
    available_memory_bytes: PositiveInt | None = None
    slots_per_rank: PositiveInt | None = None

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.plan.world_size

    @property
    def on_cpu(self) -> bool:
        """Whether ranks ran on CPUs."""
        return self.device == "cpu"


class Sample(Strict):
    """How a rank was at a moment: a line of samples.jsonl. Counts are those since the start."""

    t_s: _Amount
    rank: NonNegativeInt
    utilisation: _Amount
    memory_bytes: NonNegativeInt
    step: NonNegativeInt
    new_tokens: NonNegativeInt
    prompts_done: NonNegativeInt
    prompts_queued: NonNegativeInt
    batch_size: NonNegativeInt
    collectives: NonNegativeInt
    collectives_s: _Amount
    at: str


class Quantiles(Strict):
    """How long something took, in seconds."""

    p50: _Amount
    p95: _Amount
    max: _Amount


class Parts(Strict):
    """Seconds of a rank's passes, by what was done."""

    attention: _Amount
    router: _Amount
    dispatch: _Amount
    experts: _Amount
    combine: _Amount
    other: _Amount


class PartsOfPasses(Strict):
    """The same for each kind of pass."""

    prefill: Parts
    decode: Parts


class NumPasses(Strict):
    """Forward passes of a rank."""

    prefill: NonNegativeInt
    decode: NonNegativeInt


class PassTimes(Strict):
    """How long a pass took, in seconds; None if there was none."""

    prefill: Quantiles | None
    decode: Quantiles | None


class Collective(Strict):
    """What the collectives of one kind cost a rank; a bucket is [its upper edge in s, count]."""

    count: NonNegativeInt
    sent_bytes: NonNegativeInt
    p50_s: _Amount
    p95_s: _Amount
    max_s: _Amount
    histogram: list[Annotated[list[_Amount], Field(min_length=2, max_length=2)]]


class RankMetrics(Strict):
    """What a rank did and cost: a line of metrics.jsonl; see `engine.summary.RankSummary`."""

    rank: NonNegativeInt
    host: str
    dispatcher: str
    num_prompts: NonNegativeInt
    prompt_tokens: NonNegativeInt
    new_tokens: NonNegativeInt
    expert_rows: NonNegativeInt
    load_s: _Amount
    run_s: _Amount
    comm_s: _Amount
    comm_bytes: NonNegativeInt
    num_steps: NonNegativeInt
    num_replays: NonNegativeInt
    peak_memory_bytes: NonNegativeInt
    utilisation: _Amount
    num_passes: NumPasses
    parts_s: PartsOfPasses
    collectives: dict[Literal["exchange", "gather", "reduce", "sum", "counts"], Collective]
    first_token_s: Quantiles | None
    pass_s: PassTimes


class RankPlace(Strict, extra="ignore"):
    """What a line of metrics.jsonl says of where a rank was; the figures in it are not read."""

    rank: NonNegativeInt
    host: str


class ExpertLoads(Strict):
    """The rows that each expert of a layer computed for real tokens: a line of experts.jsonl."""

    layer: NonNegativeInt
    tokens_per_expert: Annotated[list[NonNegativeInt], Field(min_length=1)]


class BalanceWindow(Strict):
    """Balancedness of a few passes, overall and of each MoE layer: a line of balance.jsonl."""

    first_step: NonNegativeInt
    last_step: NonNegativeInt
    overall: _Share
    layers: list[_Share]


_CheckVerdict = Literal["pass", "warn", "fail"]


class BringUpCheck(Strict):
    """One thing that was looked at before the first batch; see `bringup.report.Check`."""

    name: str
    verdict: _CheckVerdict
    reason: str
    measured: float | None
    target: float | None
    unit: str


class BringUpPhase(Strict):
    """A phase of the bring-up: a line of bringup.jsonl."""

    phase: PositiveInt
    name: str
    verdict: _CheckVerdict
    seconds: _Amount
    checks: list[BringUpCheck]
