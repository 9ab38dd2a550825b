"""A job that is loaded and about to run, as one rank has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ds_moe_ep.dist.groups import Job
from ds_moe_ep.engine.decode_graph import DecodeGraph
from ds_moe_ep.engine.live_rows import LiveRows
from ds_moe_ep.engine.loading import Engine
from ds_moe_ep.engine.options import JobOptions
from ds_moe_ep.engine.prepare import Work
from ds_moe_ep.engine.schedule import Batch
from ds_moe_ep.engine.supervisor import Progress

__all__ = ["LoadedJob"]


@dataclass(frozen=True)
class LoadedJob:
    """All that serving prompts takes, and that watching it does.

    Attributes:
        options: What the user asked for.
        job: The job.
        work: What was settled before loading.
        engine: The loaded model.
        batches: What this rank is to serve.
        progress: Told where this rank is.
        live_rows: Knows which rows of a pass need experts, and counts the tokens that passes give.
        graph: Replays decode passes; None if they are run.
        predicted_bytes: Memory that a rank is to use at most; None if the system does not say.
        available_bytes: Memory that a rank may use; None if the system does not say.
    """

    options: JobOptions
    job: Job
    work: Work
    engine: Engine
    batches: Sequence[Batch]
    progress: Progress
    live_rows: LiveRows
    graph: DecodeGraph | None = None
    predicted_bytes: int | None = None
    available_bytes: int | None = None

    @property
    def num_prompts(self) -> int:
        """Prompts that this rank is to serve."""
        return sum(len(batch.indices) for batch in self.batches)

    @property
    def has_own_prompts(self) -> bool:
        """Whether this rank's prompts are its own: those of a replicated batch are rank 0's."""
        return self.options.batch_mode == "sharded" or self.job.info.rank == 0
