"""Compares expert parallelism with independent copies of the whole model on the same devices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ds_moe_ep.memory_needs import weight_bytes
from ds_moe_ep.predict.passes import Deployment
from ds_moe_ep.predict.throughput import (
    Sequences,
    SequenceTimes,
    as_replicas,
    best_batch,
    fitting_batch,
    whole_batches,
)

__all__ = ["Alternative", "compare_with_replicas"]

# How far experts are widened, and how finely, to find a model that is better spread.
_WIDEST, _FINEST = 1 << 12, 1.05


@dataclass(frozen=True)
class Alternative:
    """What copies of the whole model would do.

    Attributes:
        weight_bytes: Weights of one copy.
        fits: Whether a copy and one prompt fit on a device; None if its memory is not known.
        replicas: Their best batch; None if they do not fit.
        spread: The best batch of the plan itself; None if it does not fit.
        quicker_batches: Batches a device, of powers of two and the largest that fits, with which a
            step of the plan is quicker than that of a copy.
        wins_from_params: Parameters from which on the plan serves more sequences a second, if the
            experts of this model were made wider; None if that was not found.
    """

    weight_bytes: int
    fits: bool | None
    replicas: SequenceTimes | None
    spread: SequenceTimes | None
    quicker_batches: tuple[int, ...]
    wins_from_params: int | None


def compare_with_replicas(deployment: Deployment, sequences: Sequences) -> Alternative:
    """Compares a plan with as many independent copies of the model as there are devices."""
    copies = as_replicas(deployment)
    batch = fitting_batch(copies, sequences)
    fits = None if batch is None else batch > 0
    return Alternative(
        weight_bytes(copies.spec, copies.plan, copies.spec.param_bytes),
        fits,
        best_batch(copies, sequences),
        best_batch(deployment, sequences),
        _quicker_batches(deployment, copies, sequences),
        _params_that_win(deployment, sequences),
    )


def _quicker_batches(
    deployment: Deployment, copies: Deployment, sequences: Sequences
) -> tuple[int, ...]:
    return tuple(
        times.batch
        for times in whole_batches(deployment, sequences)
        if times.slowest.seconds < SequenceTimes(copies, sequences, times.batch).slowest.seconds
    )


def _params_that_win(deployment: Deployment, sequences: Sequences) -> int | None:
    """Searches the width of experts from which on the plan wins, between this and the widest."""
    if deployment.plan.ep_size == 1:
        return None
    low, high = 1.0, float(_WIDEST)
    if _wins(deployment, sequences, low):
        return deployment.spec.num_params
    if not _wins(deployment, sequences, high):
        # So wide that the plan itself does not fit: halve until it does.
        while high > low and best_batch(_wider(deployment, high), sequences) is None:
            high /= 2
        if high <= low or not _wins(deployment, sequences, high):
            return None
    while high / low > _FINEST:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if _wins(deployment, sequences, middle) else (middle, high)
    return _wider(deployment, high).spec.num_params


def _wins(deployment: Deployment, sequences: Sequences, factor: float) -> bool:
    wider = _wider(deployment, factor)
    spread = best_batch(wider, sequences)
    alone = best_batch(as_replicas(wider), sequences)
    if spread is None:
        return False
    return alone is None or spread.sequences_per_s > alone.sequences_per_s


def _wider(deployment: Deployment, factor: float) -> Deployment:
    spec = deployment.spec
    return replace(
        deployment,
        spec=replace(
            spec,
            moe_intermediate_size=round(spec.moe_intermediate_size * factor),
            num_params_per_expert=round(spec.num_params_per_expert * factor),
        ),
    )
