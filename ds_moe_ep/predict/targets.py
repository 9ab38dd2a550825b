"""Judges targets by predictions: met or not, up to how many tokens, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ds_moe_ep.errors import ConfigError, nearest
from ds_moe_ep.predict.passes import Deployment
from ds_moe_ep.predict.throughput import (
    Sequences,
    SequenceTimes,
    best_batch,
    fitting_batch,
    whole_batches,
)

__all__ = ["Targets", "Verdict", "judge_targets", "parse_targets"]

_KINDS = {"latency_ms": float, "sequences_per_s": float, "seq_len": int, "new_tokens": int}
_EXAMPLE = "--targets latency_ms=8,sequences_per_s=120000,seq_len=2048"
_MEMORY = "memory capacity"


@dataclass(frozen=True)
class Targets:
    """What a deployment shall do.

    Attributes:
        latency_ms: Longest time of a decode step after `seq_len` tokens, or, where nothing is
            generated, of the pass that reads a sequence.
        sequences_per_s: Least sequences a second of all ranks.
        seq_len: Tokens of a sequence, those generated among them.
        new_tokens: Tokens of it that are generated; 0: sequences are only read.
    """

    latency_ms: float | None
    sequences_per_s: float | None
    seq_len: int
    new_tokens: int = 0


@dataclass(frozen=True)
class Verdict:
    """One target, judged by the batch that serves it best.

    Attributes:
        target: As the user wrote it; "all together" for those that one batch must meet.
        is_met: Whether it is.
        predicted: What is predicted, in the target's unit; None if not one sequence fits, or for
            all together.
        batch: The batch of each rank that this is with; 0 if none fits, or none meets all.
        met_up_to_tokens: The longest sequence with which it is met; 0 if none.
        limit: What it waits for.
    """

    target: str
    is_met: bool
    predicted: float | None
    batch: int
    met_up_to_tokens: int
    limit: str


def parse_targets(text: str, default_seq_len: int) -> Targets:
    """Reads ``latency_ms=8,sequences_per_s=120000,seq_len=2048,new_tokens=128``.

    Raises:
        ConfigError: A name is unknown or a value is not a positive number.
    """
    values: dict[str, float] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        if name not in _KINDS:
            close = nearest(name, _KINDS)
            hint = f" Did you mean {close}?" if close else ""
            raise ConfigError(
                f"--targets: {name or item!r} is not one of {', '.join(_KINDS)}.{hint} "
                f"Write them like {_EXAMPLE}"
            )
        try:
            values[name] = _KINDS[name](value)
        except ValueError:
            values[name] = -1
        if not 0 < values[name] < float("inf") and (name, values[name]) != ("new_tokens", 0):
            raise ConfigError(
                f"--targets: {name}={value}: a positive number is needed. Write them like "
                f"{_EXAMPLE}"
            )
    if "latency_ms" not in values and "sequences_per_s" not in values:
        raise ConfigError(
            f"--targets {text}: neither latency_ms nor sequences_per_s is among them. Write them "
            f"like {_EXAMPLE}"
        )
    seq_len = int(values.get("seq_len", default_seq_len))
    new_tokens = int(values.get("new_tokens", 0))
    if new_tokens >= seq_len:
        raise ConfigError(
            f"--targets: new_tokens={new_tokens} leaves nothing to read of seq_len={seq_len}. "
            f"Use new_tokens up to {seq_len - 1}."
        )
    return Targets(values.get("latency_ms"), values.get("sequences_per_s"), seq_len, new_tokens)


def judge_targets(deployment: Deployment, targets: Targets) -> list[Verdict]:
    """Judges each target by itself, and all together where there are several."""
    wanted: list[tuple[str, _Find]] = []
    if targets.latency_ms is not None:
        wanted.append((f"latency_ms={targets.latency_ms:g}", _quickest))
    if targets.sequences_per_s is not None:
        wanted.append((f"sequences_per_s={targets.sequences_per_s:g}", _most))
    if len(wanted) > 1:
        wanted.append(("all together", _meeting_all))
    return [_judge(deployment, targets, name, find) for name, find in wanted]


_Find = Callable[[Deployment, Sequences, Targets], "tuple[SequenceTimes | None, bool]"]


def _judge(deployment: Deployment, targets: Targets, name: str, find: _Find) -> Verdict:
    def sequences(length: int) -> Sequences:
        return Sequences(length - targets.new_tokens, targets.new_tokens)

    found, is_met = find(deployment, sequences(targets.seq_len), targets)
    most = deployment.spec.max_position_embeddings
    up_to = _longest(
        lambda length: find(deployment, sequences(length), targets)[1],
        targets.new_tokens + 1,
        max(most, targets.seq_len),
    )
    predicted = None
    if found is not None and find is not _meeting_all:
        is_latency = find is _quickest
        predicted = found.slowest.seconds * 1e3 if is_latency else found.sequences_per_s
    return Verdict(
        name,
        is_met,
        predicted,
        found.batch if found is not None and (is_met or find is not _meeting_all) else 0,
        up_to,
        _limit(deployment, sequences(targets.seq_len), found, is_latency=find is _quickest),
    )


def _quickest(
    deployment: Deployment, sequences: Sequences, targets: Targets
) -> tuple[SequenceTimes | None, bool]:
    found = next(whole_batches(deployment, sequences), None)
    return found, found is not None and _is_quick(found, targets)


def _most(
    deployment: Deployment, sequences: Sequences, targets: Targets
) -> tuple[SequenceTimes | None, bool]:
    found = best_batch(deployment, sequences)
    return found, found is not None and _are_many(found, targets)


def _meeting_all(
    deployment: Deployment, sequences: Sequences, targets: Targets
) -> tuple[SequenceTimes | None, bool]:
    """Finds a batch that is quick enough and serves enough; else the largest quick one, if any."""
    found = None
    for times in whole_batches(deployment, sequences):
        if found is None or _is_quick(times, targets):
            found = times
        if _is_quick(times, targets) and _are_many(times, targets):
            return times, True
    return found, False


def _is_quick(times: SequenceTimes, targets: Targets) -> bool:
    return targets.latency_ms is None or times.slowest.seconds * 1e3 <= targets.latency_ms


def _are_many(times: SequenceTimes, targets: Targets) -> bool:
    return targets.sequences_per_s is None or times.sequences_per_s >= targets.sequences_per_s


def _limit(
    deployment: Deployment, sequences: Sequences, found: SequenceTimes | None, *, is_latency: bool
) -> str:
    if found is None:
        return _MEMORY
    if is_latency:
        return found.slowest.bound
    is_largest = found.batch == fitting_batch(deployment, sequences)
    # A larger batch would share what each pass costs anyway, if there were room for it.
    shared = found.bound in ("network latency", "launching operations", "starting kernels")
    return _MEMORY if is_largest and shared else found.bound


def _longest(is_met: Callable[[int], bool], shortest: int, longest: int) -> int:
    """Returns the greatest length with which something is met, if it is for all shorter ones."""
    if not is_met(shortest):
        return 0
    if is_met(longest):
        return longest
    low, high = shortest, longest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low
