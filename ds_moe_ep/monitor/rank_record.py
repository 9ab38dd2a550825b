"""What one rank has recorded in a job: gathered on rank 0, most of it a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_moe_ep.dist.comm_stats import CommStats, KindStats
from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.monitor.metrics_format import Sample
from ds_moe_ep.monitor.recorder import Recorder

__all__ = ["RankRecord"]


@dataclass(frozen=True)
class RankRecord:
    """The figures of a rank.

    Attributes:
        summary: Those of every job.
        utilisation: Mean over its samples.
        num_passes: Its own passes, by kind (``prefill``, ``decode``).
        parts_s: Seconds in each part of them, by kind.
        pass_s: p50, p95 and max of a pass, by kind; None of a kind that there was none of.
        first_token_s: The same of the time from the start of a batch to its first token.
        collectives: By kind: count, sent_bytes, p50_s, p95_s, max_s and the histogram.
        tokens_per_expert: Live tokens of this rank that chose each expert ``[L][E]``.
        window_rows: Rows that its experts computed, by window of passes and layer.
        window_steps: Passes of a window.
    """

    summary: RankSummary
    utilisation: float
    num_passes: dict[str, int]
    parts_s: dict[str, dict[str, float]]
    pass_s: dict[str, dict[str, float] | None]
    first_token_s: dict[str, float] | None
    collectives: dict[str, dict[str, Any]]
    tokens_per_expert: list[list[int]]
    window_rows: list[list[int]]
    window_steps: int

    @classmethod
    def of(
        cls,
        summary: RankSummary,
        recorder: Recorder,
        samples: Sequence[Sample],
        stats: Iterable[CommStats],
    ) -> RankRecord:
        """Returns what a recorder that is closed, the samples and the MoE layers have."""
        times = recorder.clock.times
        looks = samples[1:]  # the first is of no time at all
        return cls(
            summary=summary,
            utilisation=sum(each.utilisation for each in looks) / max(1, len(looks)),
            num_passes={kind: each.count for kind, each in times.items()},
            parts_s={kind: each.estimated_parts_s() for kind, each in times.items()},
            pass_s={kind: each.durations.quantiles() for kind, each in times.items()},
            first_token_s=recorder.first_token_s.quantiles(),
            collectives=_by_kind(stats),
            tokens_per_expert=recorder.loads.tokens_LE.tolist(),
            window_rows=recorder.windows.rows,
            window_steps=recorder.windows.num_steps,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the line; what is merged over ranks stands in other files."""
        own = asdict(self)
        for name in ("tokens_per_expert", "window_rows", "window_steps"):
            del own[name]
        return own.pop("summary") | own


def _by_kind(stats: Iterable[CommStats]) -> dict[str, dict[str, Any]]:
    by_kind: dict[str, list[KindStats]] = {}
    for of_layer in stats:
        for kind, each in of_layer.by_kind.items():
            by_kind.setdefault(kind, []).append(each)
    merged = {}
    for kind, parts in sorted(by_kind.items()):
        durations = Durations.merged(part.durations for part in parts)
        merged[kind] = {
            "count": durations.count,
            "sent_bytes": sum(part.sent_bytes for part in parts),
            "p50_s": durations.quantile(0.5),
            "p95_s": durations.quantile(0.95),
            "max_s": durations.max_s,
            "histogram": durations.histogram(),
        }
    return merged
