"""Predicts what batches fit in a device's memory, and what whole sequences take."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from ds_moe_ep.memory_needs import (
    BatchNeeds,
    kv_bytes_per_token,
    largest_batch,
    room_bytes,
    weight_bytes,
)
from ds_moe_ep.model_spec import ModelSpec
from ds_moe_ep.plan import ParallelPlan
from ds_moe_ep.predict.hardware import Device
from ds_moe_ep.predict.passes import Deployment, Pass, PassTimes, predict_pass

__all__ = [
    "Memory",
    "SequenceTimes",
    "Sequences",
    "as_replicas",
    "best_batch",
    "fitting_batch",
    "whole_batches",
]

_MOST_PROMPTS, _MOST_IF_MEMORY_UNKNOWN = 1 << 16, 1 << 8


@dataclass(frozen=True)
class Sequences:
    """What is asked of the model.

    Attributes:
        prompt_tokens: Tokens that are read, in one pass.
        new_tokens: Tokens generated after them, a pass each but the first; 0: prompts are only
            read (scored).
    """

    prompt_tokens: int
    new_tokens: int

    @property
    def length(self) -> int:
        """Tokens of a sequence in all."""
        return self.prompt_tokens + self.new_tokens


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank.

    Attributes:
        weight_bytes: Its dense weights and its experts.
        kv_bytes_per_token: What the cache grows by with each token of a prompt.
        needs: What each prompt of a batch takes, when it is longest.
        room_bytes: What batches may take; None if the device's memory is not known.
    """

    weight_bytes: int
    kv_bytes_per_token: int
    needs: BatchNeeds
    room_bytes: int | None

    @classmethod
    def of(
        cls,
        spec: ModelSpec,
        plan: ParallelPlan,
        sequences: Sequences,
        device: Device | None,
        dispatcher: str = "alltoall",
    ) -> Memory:
        """Returns the memory that sequences take; without a device, not what there is room for.

        Args:
            spec: The model.
            plan: The parallel sizes.
            sequences: What is asked of it.
            device: What each rank computes on.
            dispatcher: How rows travel.
        """
        weights = weight_bytes(spec, plan, spec.param_bytes)
        room = None
        if device is not None and device.memory_bytes is not None:
            room = room_bytes(device.memory_bytes - device.reserved_bytes - weights)
        return cls(
            weights,
            kv_bytes_per_token(spec, spec.param_bytes),
            BatchNeeds.of(
                spec,
                ep_size=plan.ep_size,
                prompt_tokens=sequences.prompt_tokens,
                new_tokens=sequences.new_tokens,
                element_bytes=spec.param_bytes,
                on_gpu=device is None or device.overlaps,
                dispatcher=dispatcher,
            ),
            room,
        )

    @property
    def largest_batch(self) -> int | None:
        """Prompts that fit on a rank at a time; None if its memory is not known."""
        return None if self.room_bytes is None else largest_batch(self.room_bytes, self.needs)


@dataclass(frozen=True)
class SequenceTimes:
    """The prediction for sequences in batches of one size.

    Attributes:
        deployment: What runs them.
        sequences: What they are.
        batch: Prompts of each rank at a time.
    """

    deployment: Deployment
    sequences: Sequences
    batch: int

    @cached_property
    def prefill(self) -> PassTimes:
        """The pass that reads all prompts of a batch."""
        tokens, is_scored = self.sequences.prompt_tokens, self.sequences.new_tokens == 0
        return predict_pass(
            self.deployment, Pass(self.batch, tokens, is_first=True, is_scored=is_scored)
        )

    @cached_property
    def step(self) -> PassTimes:
        """A decode step, in the middle of the tokens that are generated."""
        context = self.sequences.prompt_tokens + self.sequences.new_tokens // 2
        return predict_pass(self.deployment, Pass(self.batch, context=context))

    @property
    def slowest(self) -> PassTimes:
        """What a user waits for between tokens: a step, or the pass where nothing is generated."""
        return self.step if self.sequences.new_tokens else self.prefill

    @property
    def seconds(self) -> float:
        """Seconds of a batch from its start to its end."""
        num_steps = max(0, self.sequences.new_tokens - 1)  # the prefill makes the first token
        return self.prefill.seconds + (num_steps * self.step.seconds if num_steps else 0.0)

    @property
    def sequences_per_s(self) -> float:
        """Sequences a second of all ranks."""
        return self.batch * self.deployment.plan.dense_dp_size / self.seconds

    @property
    def tokens_per_s(self) -> float:
        """Tokens a second of all ranks in decode steps; of prompts, where none are generated."""
        tokens = 1 if self.sequences.new_tokens else self.sequences.prompt_tokens
        return self.batch * tokens * self.deployment.plan.dense_dp_size / self.slowest.seconds

    @property
    def bound(self) -> str:
        """What most of the time is waited for."""
        num_steps = max(0, self.sequences.new_tokens - 1)
        if num_steps and num_steps * self.step.seconds > self.prefill.seconds:
            return self.step.bound
        return self.prefill.bound


def fitting_batch(deployment: Deployment, sequences: Sequences) -> int | None:
    """Returns the prompts that fit on a rank at a time; None if its memory is not known."""
    return Memory.of(deployment.spec, deployment.plan, sequences, deployment.device).largest_batch


def whole_batches(deployment: Deployment, sequences: Sequences) -> Iterator[SequenceTimes]:
    """Yields predictions for batches of 1, 2, 4 and so on that fit, the largest that fits last.

    Nothing is yielded where not even one prompt fits; if memory is not known, 256 are taken to.
    """
    fits = fitting_batch(deployment, sequences)
    most = _MOST_IF_MEMORY_UNKNOWN if fits is None else min(fits, _MOST_PROMPTS)
    batch = 1
    while batch < most:
        yield SequenceTimes(deployment, sequences, batch)
        batch *= 2
    if most:
        yield SequenceTimes(deployment, sequences, most)


def best_batch(deployment: Deployment, sequences: Sequences) -> SequenceTimes | None:
    """Returns the batch with most sequences a second; None if not one prompt fits."""
    return max(
        whole_batches(deployment, sequences), key=lambda times: times.sequences_per_s, default=None
    )


def as_replicas(deployment: Deployment) -> Deployment:
    """Returns the alternative: a whole copy of the model on each rank, without communication."""
    replicas = ParallelPlan(ep_size=1, dp_size=deployment.plan.world_size)
    return replace(deployment, plan=replicas, links=None)
