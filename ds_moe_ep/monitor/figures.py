"""A job as rank 0 knows it while it runs, and a few numbers that say how it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_moe_ep.monitor.metrics_format import BalanceWindow, Sample

__all__ = ["JobNow", "figures"]


@dataclass(frozen=True)
class JobNow:
    """What rank 0 knows of all ranks.

    Attributes:
        samples: The last sample of each rank.
        window: How even they were in the last passes that all have told of; None at first.
    """

    samples: Sequence[Sample]
    window: BalanceWindow | None = None


def figures(now: JobNow) -> dict[str, float]:
    """Returns figures of the whole job by name, units in their names; without a window no balance.

    Args:
        now: With one sample at least.
    """
    samples, window = now.samples, now.window
    memory = [sample.memory_bytes for sample in samples]
    mean_memory = sum(memory) / len(memory)
    elapsed_s = max(sample.t_s for sample in samples)
    new_tokens = sum(sample.new_tokens for sample in samples)
    collectives = sum(sample.collectives for sample in samples)
    collectives_s = sum(sample.collectives_s for sample in samples)
    balance = {} if window is None else _of_window(window)
    return {
        "utilisation_mean": sum(sample.utilisation for sample in samples) / len(samples),
        "utilisation_min": min(sample.utilisation for sample in samples),
        "memory_max_bytes": max(memory),
        "memory_variance": (max(memory) - min(memory)) / mean_memory if mean_memory else 0.0,
        **balance,
        "collective_mean_s": collectives_s / collectives if collectives else 0.0,
        "new_tokens": new_tokens,
        "tokens_per_second": new_tokens / elapsed_s if elapsed_s else 0.0,
        "prompts_done": sum(sample.prompts_done for sample in samples),
        "prompts_queued": sum(sample.prompts_queued for sample in samples),
    }


def _of_window(window: BalanceWindow) -> dict[str, float]:
    return {"balancedness": window.overall, "balancedness_worst_layer": min(window.layers)}
