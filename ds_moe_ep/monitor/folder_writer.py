"""The folder of --metrics, as rank 0 writes it; docs/metrics.md says what is in it.

Lines of samples.jsonl are added while a job runs, all other files are written in one step.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_moe_ep.balance import balancedness
from ds_moe_ep.config.recorded import EXPERTS_JSONL, RANKS_JSONL
from ds_moe_ep.engine.outputs import write_lines
from ds_moe_ep.errors import ResourceError
from ds_moe_ep.monitor.metrics_format import BALANCE_JSONL, RUN_JSON, SAMPLES_JSONL, Run, Sample
from ds_moe_ep.monitor.rank_record import RankRecord

__all__ = ["FolderWriter"]

_SAMPLE_DIGITS = 4


class FolderWriter:
    """A metrics folder that is being written.

    Args:
        path: The folder, made if it is not there; what an earlier job left in it is replaced.
        run: What is run.

    Raises:
        ResourceError: It cannot be written.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self._path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in (RANKS_JSONL, EXPERTS_JSONL, BALANCE_JSONL):
                (path / name).unlink(missing_ok=True)
            (path / SAMPLES_JSONL).write_text("", encoding="utf-8")
            write_lines(path / RUN_JSON, [run.model_dump_json(indent=2) + "\n"])
        except OSError as error:
            raise ResourceError(
                f"{path}: cannot be written ({error.strerror}). Name another folder with --metrics."
            ) from error

    def add_samples(self, samples: Sequence[Sample]) -> None:
        """Adds a line for each rank."""
        lines = "".join(json.dumps(_rounded(sample.model_dump())) + "\n" for sample in samples)
        with (self._path / SAMPLES_JSONL).open("a", encoding="utf-8") as file:
            file.write(lines)

    def finish(self, ranks: Sequence[RankRecord], moe_layers: Sequence[int]) -> None:
        """Writes what all ranks have recorded.

        Args:
            ranks: All ranks, in order.
            moe_layers: Numbers of the MoE layers in the model.

        Raises:
            ResourceError: It cannot be written.
        """
        try:
            self._finish(ranks, moe_layers)
        except OSError as error:
            raise ResourceError(
                f"{self._path}: cannot be written ({error.strerror}). The results of the job are "
                "whole; only its metrics are not."
            ) from error

    def _finish(self, ranks: Sequence[RankRecord], moe_layers: Sequence[int]) -> None:
        self._write(RANKS_JSONL, (rank.to_dict() for rank in ranks))
        tokens = [
            [sum(counts) for counts in zip(*of_ranks, strict=True)]
            for of_ranks in zip(*(rank.tokens_per_expert for rank in ranks), strict=True)
        ]
        self._write(
            EXPERTS_JSONL,
            (
                {"layer": layer, "tokens_per_expert": counts}
                for layer, counts in zip(moe_layers, tokens, strict=True)
            ),
        )
        self._write(BALANCE_JSONL, _windows(ranks))

    def _write(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        write_lines(self._path / name, (json.dumps(record) + "\n" for record in records))


def _windows(ranks: Sequence[RankRecord]) -> list[dict[str, Any]]:
    """Returns how even the ranks were in each window of passes."""
    steps, last = ranks[0].window_steps, ranks[0].summary.num_steps
    windows = []
    for number, of_ranks in enumerate(zip(*(rank.window_rows for rank in ranks), strict=True)):
        layers = list(zip(*of_ranks, strict=True))  # by layer, then by rank
        windows.append(
            {
                "first_step": number * steps + 1,
                "last_step": min((number + 1) * steps, last),
                "overall": balancedness([sum(rows) for rows in of_ranks]),
                "layers": [balancedness(rows) for rows in layers],
            }
        )
    return windows


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: round(value, _SAMPLE_DIGITS) if isinstance(value, float) else value
        for name, value in record.items()
    }
