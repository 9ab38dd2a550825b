"""Phase 4: weights as predicted, memory even over ranks, and the batch that fits what is left.

What a rank needs is predicted in memory_needs.py; what it has is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ds_moe_ep import host_memory
from ds_moe_ep.bringup.report import FAIL, PASS, WARN, Check, judged
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.memory_needs import BatchNeeds, largest_batch, room_bytes

__all__ = [
    "MOST_AUTO",
    "RankMemory",
    "check_room_for_weights",
    "choose_batch_size",
    "judge_batch",
    "judge_room_for_weights",
    "judge_spread",
    "judge_weights",
    "measure_memory",
    "used_bytes",
]

TARGET_SPREAD = 0.05
"""The most that the ranks' memory should differ, of its mean."""

MOST_AUTO = 32
"""The largest batch that is chosen by itself: more gains little and keeps results back longer."""

_TOLERANCE = 0.05
# What processes and allocators differ by that hold the same tensors.
_NOISE_BYTES = 64 << 20
_MIB, _GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class RankMemory:
    """The memory of one rank after loading.

    Attributes:
        rank: Global rank.
        host: Its host.
        predicted_bytes: What its weights should take.
        held_bytes: What its parameters take.
        grown_bytes: What loading added to the device, or to the process on a CPU; None where the
            system does not say.
        free_bytes: What it may still take: of its GPU, or its part of the host's memory.
    """

    rank: int
    host: str
    predicted_bytes: int
    held_bytes: int
    grown_bytes: int | None
    free_bytes: int | None

    def __str__(self) -> str:
        """Names the rank the way error messages do."""
        return f"rank {self.rank} {self.host}"

    @property
    def room_bytes(self) -> int | None:
        """What batches may take: what is free, less a margin."""
        return None if self.free_bytes is None else room_bytes(self.free_bytes)


def used_bytes(device: torch.device) -> int | None:
    """Returns what this rank takes now: of its GPU, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return host_memory.proportional_bytes()


def measure_memory(
    job: Job, model: nn.Module, predicted_bytes: int, before_bytes: int | None
) -> list[RankMemory]:
    """Returns the memory of all ranks; all call it after loading.

    Args:
        job: The job.
        model: This rank's model.
        predicted_bytes: What its weights should take.
        before_bytes: What `used_bytes` said before loading.
    """
    after = used_bytes(job.device)
    sizes = {
        param.untyped_storage().data_ptr(): param.numel() * param.element_size()
        for param in model.parameters()
    }
    own = RankMemory(
        rank=job.info.rank,
        host=job.info.host,
        predicted_bytes=predicted_bytes,
        held_bytes=sum(sizes.values()),
        grown_bytes=None if after is None or before_bytes is None else after - before_bytes,
        free_bytes=_free_bytes(job),
    )
    return job.all_gather(own)


def check_room_for_weights(job: Job, predicted_bytes: int) -> Check:
    """Compares what is free on all ranks with the weights to load; all ranks call it.

    The smallest batch is judged later, by what loading has left.
    """
    found = {str(info): free for info, free in job.all_gather((job.info, _free_bytes(job)))}
    return judge_room_for_weights(found, predicted_bytes)


def judge_room_for_weights(free_bytes: Mapping[str, int | None], predicted_bytes: int) -> Check:
    """Finds out whether the weights of each rank fit in what it has free.

    Args:
        free_bytes: By rank, as messages name it.
        predicted_bytes: What the weights of each will take.
    """
    known = {rank: free for rank, free in free_bytes.items() if free is not None}
    if not known or min(known.values()) >= predicted_bytes:
        return Check("room", PASS, f"{_size(predicted_bytes)} of weights a rank fit")
    rank, free = min(known.items(), key=lambda item: item[1])
    return Check(
        "room",
        FAIL,
        f"the weights of a rank take {_size(predicted_bytes)}, but [{rank}] has {_size(free)} "
        "free. Use a higher ep_size on more ranks, --dtype bfloat16, or end what else runs there",
        predicted_bytes,
        free,
        "bytes",
    )


def _free_bytes(job: Job) -> int | None:
    if job.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(job.device)
        cached = torch.cuda.memory_reserved(job.device) - torch.cuda.memory_allocated(job.device)
        return free + cached
    available = host_memory.available_bytes()
    num_here = job.nodes.count(job.nodes[job.info.rank])
    return None if available is None else available // num_here


def judge_weights(ranks: Sequence[RankMemory], *, is_exact: bool) -> Check:
    """Compares the weights that ranks hold with the prediction.

    Args:
        ranks: All ranks.
        is_exact: Whether the model's parameters are counted, not estimated.
    """
    worst = max(ranks, key=lambda rank: abs(rank.held_bytes - rank.predicted_bytes))
    held, predicted = worst.held_bytes, worst.predicted_bytes
    text = f"{_size(predicted)} predicted, {_size(held)} held"
    grown = [rank.grown_bytes for rank in ranks if rank.grown_bytes is not None]
    if grown:
        text += f", memory grew by {_size(max(grown))} at most"
    if abs(held - predicted) > _TOLERANCE * predicted:
        why = "the prediction is off" if is_exact else "the prediction is an estimate"
        return Check("weights", WARN, f"[{worst}] {text}: {why}", held, predicted, "bytes")
    if grown and max(grown) > max(1.25 * held, held + 4 * _NOISE_BYTES):
        why = "loading has not given all back"
        return Check("weights", WARN, f"{text}: {why}", max(grown), held, "bytes")
    return Check("weights", PASS, text, held, predicted, "bytes")


def judge_spread(ranks: Sequence[RankMemory]) -> Check:
    """Judges how much the ranks' memory differs; what processes differ by anyway does not count."""
    grown = [rank.grown_bytes for rank in ranks if rank.grown_bytes is not None]
    held = [rank.held_bytes for rank in ranks]
    values = grown if len(grown) == len(ranks) and _differ(grown) > _NOISE_BYTES else held
    share = _differ(values) / (sum(values) / len(values))
    fullest = ranks[values.index(max(values))]
    what = "held" if values is held else "grown"
    return judged(
        "even memory",
        round(share, 4),
        TARGET_SPREAD,
        "of the mean",
        f"{_size(min(values))} to {_size(max(values))} {what}, (max - min) / mean = {share:.1%} "
        f"(target {TARGET_SPREAD:.0%})",
        missed=f"[{fullest}] has most: look what else runs there",
    )


def choose_batch_size(
    ranks: Sequence[RankMemory], needs: BatchNeeds, num_prompts: int, asked: int | None
) -> tuple[int, str]:
    """Returns the batch size to use, and why.

    Args:
        ranks: All ranks.
        needs: Those of the longest prompt.
        num_prompts: Prompts that a rank has at most.
        asked: The user's; None lets it be chosen: a power of two that fits on every rank, no more
            than there are prompts for.
    """
    if asked is not None:
        return asked, f"{asked}, as asked for"
    size, fits = 1, _fits(ranks, needs)
    while 2 * size <= MOST_AUTO and size < num_prompts and (fits is None or 2 * size <= fits):
        size *= 2
    if size >= num_prompts:
        return size, f"{size}: no rank has more than {num_prompts} prompts"
    if size == MOST_AUTO:
        return size, f"{size}, the most that is chosen by itself (--batch-size N takes more)"
    return size, f"{size}: of the powers of two, the largest that fits in memory"


def judge_batch(
    ranks: Sequence[RankMemory], needs: BatchNeeds, batch_size: int, largest_run: int
) -> Check:
    """Finds out whether the batches to be run fit, and which would.

    Args:
        ranks: All ranks.
        needs: Those of the longest prompt.
        batch_size: The batch size, by the user's word or chosen.
        largest_run: Prompts of the largest batch that there is.
    """
    fits = _fits(ranks, needs)
    each = f"{_size(needs.kv_bytes)} of KV cache and about {_size(needs.pass_bytes)} of a pass"
    if fits is None:
        return Check("KV cache", PASS, f"{each} a prompt; what is free is not known here")
    tightest = min(ranks, key=lambda rank: rank.room_bytes or 0)
    room = _size(tightest.room_bytes or 0)
    if largest_run <= fits:
        told = f"room for {fits:,} prompts of the longest kind ({each}) in {room} a rank"
        return Check("KV cache", PASS, told, largest_run, fits, "prompts")
    if fits:
        way_out = f"Use --batch-size {fits}"
    else:
        way_out = (
            "Not one fits: use shorter prompts, a lower --max-new-tokens, --dtype bfloat16 or "
            "GPUs with more memory"
        )
    told = (
        f"--batch-size {batch_size} does not fit: [{tightest}] has room for {room}, and each "
        f"of {largest_run} prompts takes {each}. {way_out}"
    )
    return Check("KV cache", FAIL, told, largest_run, fits, "prompts")


def _fits(ranks: Sequence[RankMemory], needs: BatchNeeds) -> int | None:
    rooms = [rank.room_bytes for rank in ranks]
    known = [room for room in rooms if room is not None]
    return largest_batch(min(known), needs) if len(known) == len(rooms) else None


def _differ(values: Sequence[int]) -> int:
    return max(values) - min(values)


def _size(num_bytes: float) -> str:
    for unit, unit_bytes in (("GiB", _GIB), ("MiB", _MIB)):
        if abs(num_bytes) >= unit_bytes:
            return f"{num_bytes / unit_bytes:,.2f} {unit}"
    return f"{num_bytes / 1024:,.1f} KiB"
