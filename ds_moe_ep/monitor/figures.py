"""A few numbers that say how all ranks are now, from the last sample of each."""

from __future__ import annotations

from collections.abc import Sequence

from ds_moe_ep.monitor.metrics_format import Sample

__all__ = ["figures"]


def figures(samples: Sequence[Sample]) -> dict[str, float]:
    """Returns figures of the whole job by name, units in their names.

    Args:
        samples: The last sample of each rank; one at least.
    """
    memory = [sample.memory_bytes for sample in samples]
    mean_memory = sum(memory) / len(memory)
    elapsed_s = max(sample.t_s for sample in samples)
    new_tokens = sum(sample.new_tokens for sample in samples)
    return {
        "utilisation_mean": sum(sample.utilisation for sample in samples) / len(samples),
        "utilisation_min": min(sample.utilisation for sample in samples),
        "memory_max_bytes": max(memory),
        "memory_variance": (max(memory) - min(memory)) / mean_memory if mean_memory else 0.0,
        "new_tokens": new_tokens,
        "tokens_per_second": new_tokens / elapsed_s if elapsed_s else 0.0,
        "prompts_done": sum(sample.prompts_done for sample in samples),
        "prompts_queued": sum(sample.prompts_queued for sample in samples),
    }
