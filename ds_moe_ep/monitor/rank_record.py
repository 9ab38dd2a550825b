"""What one rank has recorded in a job: gathered on rank 0, most of it a line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ds_moe_ep.dist.comm_stats import CommStats, KindStats
from ds_moe_ep.dist.durations import Durations
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.moe.layer import DispatchedExperts
from ds_moe_ep.monitor.recorder import Recorder
from ds_moe_ep.monitor.windows import Border

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
        rows_of_expert: For each MoE layer, the rows that each of its experts computed.
        borders: Rows that they had computed after so many passes.
    """

    summary: RankSummary
    utilisation: float
    num_passes: dict[str, int]
    parts_s: dict[str, dict[str, float]]
    pass_s: dict[str, dict[str, float] | None]
    first_token_s: dict[str, float] | None
    collectives: dict[str, dict[str, Any]]
    rows_of_expert: list[dict[int, int]]
    borders: list[Border]

    @classmethod
    def of(
        cls,
        summary: RankSummary,
        recorder: Recorder,
        utilisation: float,
        layers: Sequence[DispatchedExperts],
        experts: Sequence[Sequence[int]],
    ) -> RankRecord:
        """Returns what there is to know of a rank when its work is done.

        Args:
            summary: Its figures of every job.
            recorder: Its recorder, closed.
            utilisation: Mean over its samples.
            layers: Its MoE layers.
            experts: For each of them, which experts are here.
        """
        times = recorder.clock.times
        return cls(
            summary=summary,
            utilisation=utilisation,
            num_passes={kind: each.count for kind, each in times.items()},
            parts_s={kind: each.estimated_parts_s() for kind, each in times.items()},
            pass_s={kind: each.durations.quantiles() for kind, each in times.items()},
            first_token_s=recorder.first_token_s.quantiles(),
            collectives=_by_kind(layer.stats for layer in layers),
            rows_of_expert=[
                _by_expert(held, layer.tokens_per_expert.tolist())
                for held, layer in zip(experts, layers, strict=True)
            ],
            borders=recorder.borders.passed,
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns the line; what is merged over ranks stands in other files."""
        own = asdict(self)
        del own["rows_of_expert"], own["borders"]
        return own.pop("summary") | own


def _by_expert(held: Sequence[int], rows: Sequence[int]) -> dict[int, int]:
    """Returns rows by expert; two slots of a rank may hold the same one."""
    by_expert = dict.fromkeys(held, 0)
    for expert, count in zip(held, rows, strict=True):
        by_expert[expert] += count
    return by_expert


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
