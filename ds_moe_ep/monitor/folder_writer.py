"""The folder of --metrics, as rank 0 writes it; docs/metrics.md says what is in it.

Lines are added to samples.jsonl and balance.jsonl while a job runs; at its end balance.jsonl is
replaced by one with the windows of the whole run. All other files are written in one step, and
metrics.jsonl last: a folder that has it is that of a finished job, and whole. A folder that cannot
be written is refused before a weight is read; one that fails after the first prompt is told, and
left as it is.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ResourceError
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.metrics_folder import not_writable
from ds_moe_ep.monitor.metrics_format import (
    BALANCE_JSONL,
    EXPERTS_JSONL,
    RANKS_JSONL,
    RUN_JSON,
    SAMPLES_JSONL,
    BalanceWindow,
    Run,
    Sample,
)
from ds_moe_ep.monitor.rank_record import RankRecord
from ds_moe_ep.monitor.windows import balance_windows
from ds_moe_ep.whole_file import write_lines

__all__ = ["FolderWriter"]

_DIGITS = 4


class FolderWriter:
    """A metrics folder that is being written.

    Args:
        path: The folder, made if it is not there; what an earlier job left in it is replaced.
        run: What is run.

    Raises:
        ResourceError: It cannot be written.
    """

    def __init__(self, path: Path, run: Run) -> None:
        self._path, self._run = path, run
        self._last_window: BalanceWindow | None = None
        self._has_failed = False
        try:
            path.mkdir(parents=True, exist_ok=True)
            for name in (RANKS_JSONL, EXPERTS_JSONL):
                (path / name).unlink(missing_ok=True)
            for name in (SAMPLES_JSONL, BALANCE_JSONL):
                (path / name).write_text("", encoding="utf-8")
            write_lines(path / RUN_JSON, [run.model_dump_json(indent=2) + "\n"])
        except OSError as error:
            raise ResourceError(not_writable(path, error)) from error

    def add(self, now: JobNow) -> None:
        """Adds a line for each rank, and one for the window if it is new."""
        if self._has_failed:
            return
        with self._told():
            self._append(SAMPLES_JSONL, now.samples)
            if now.window is not None and now.window != self._last_window:
                self._append(BALANCE_JSONL, [now.window])
                self._last_window = now.window

    def finish(self, ranks: Sequence[RankRecord]) -> None:
        """Writes what all ranks have recorded.

        Args:
            ranks: All ranks, in order.
        """
        if self._has_failed:
            return
        with self._told():
            self._finish(ranks)

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Says, instead of ending the job, that its metrics cannot be written."""
        try:
            yield
        except OSError as error:
            self._has_failed = True
            warnings.warn(
                f"{self._path}: cannot be written ({error.strerror}). The job goes on, but its "
                "metrics will not be whole.",
                stacklevel=1,
            )

    def _finish(self, ranks: Sequence[RankRecord]) -> None:
        self._write(EXPERTS_JSONL, self._expert_loads(ranks))
        windows = balance_windows([rank.borders for rank in ranks])
        self._write(BALANCE_JSONL, (window.model_dump() for window in windows))
        self._write(RANKS_JSONL, (rank.to_dict() for rank in ranks))

    def _expert_loads(self, ranks: Sequence[RankRecord]) -> Iterator[dict[str, Any]]:
        """Yields the tokens of each expert, layer by layer.

        Experts compute a row for each token that chose them, and no others; so their rows are
        counted, as often as a token was computed.
        """
        times = _times_computed(self._run)
        of_layers = zip(*(rank.rows_of_expert for rank in ranks), strict=True)
        for layer, of_ranks in zip(self._run.moe_layers, of_layers, strict=True):
            rows = [0] * self._run.num_experts
            for rows_of_expert in of_ranks:
                for expert, count in rows_of_expert.items():
                    rows[expert] += count
            yield {"layer": layer, "tokens_per_expert": [count // times for count in rows]}

    def _append(self, name: str, lines: Sequence[Sample | BalanceWindow]) -> None:
        text = "".join(json.dumps(_rounded(line.model_dump())) + "\n" for line in lines)
        with (self._path / name).open("a", encoding="utf-8") as file:
            file.write(text)

    def _write(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        write_lines(self._path / name, (json.dumps(record) + "\n" for record in records))


def _times_computed(run: Run) -> int:
    """Returns how often experts compute a row of one token: of a replicated batch, once a copy.

    Each expert group has all tokens then; with allreduce it computes them once, with any other
    dispatcher once for each of its ranks, who all send theirs.
    """
    if run.batch_mode == "sharded":
        return 1
    return run.plan.dp_size if run.dispatcher == "allreduce" else run.world_size


def _rounded(value: Any) -> Any:
    """Returns figures, and lists and objects of them, with few digits: this grows by the second."""
    if isinstance(value, float):
        return round(value, _DIGITS)
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return value
