"""Reads the folder that a job writes with ``--metrics``, strictly, as that of one job.

What stands in it is in metrics_format.py; what the figures say is not decided here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ds_moe_ep.config.recorded import EXPERTS_JSONL, RANKS_JSONL, read_expert_loads
from ds_moe_ep.config.strict import Strict, parse, read_json, read_json_lines
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.metrics_format import (
    BALANCE_JSONL,
    RUN_JSON,
    SAMPLES_JSONL,
    VERSION,
    BalanceWindow,
    RankMetrics,
    Run,
    Sample,
)

__all__ = ["Metrics", "SampleFile", "read_metrics", "read_run"]

_HOW = "Name a folder that a finished job wrote: infer.py ... --metrics DIR."


@dataclass(frozen=True)
class Metrics:
    """All that a job recorded.

    Attributes:
        folder: Where.
        run: What was run.
        ranks: What each rank did, in the order of the ranks.
        samples: How ranks were, in the order they were written.
        expert_loads: By MoE layer, the tokens of each expert.
        windows: Balancedness over time.
    """

    folder: Path
    run: Run
    ranks: tuple[RankMetrics, ...]
    samples: tuple[Sample, ...]
    expert_loads: dict[int, tuple[int, ...]]
    windows: tuple[BalanceWindow, ...]


def read_metrics(folder: Path) -> Metrics:
    """Returns what a finished job recorded.

    Raises:
        ConfigError: A file is missing, damaged, of another version, or of another job than the
            others.
    """
    run = read_run(folder)
    if not (folder / RANKS_JSONL).is_file():
        raise ConfigError(
            f"{folder} has no {RANKS_JSONL}: the job has not ended, or was stopped before it did. "
            f"Follow it while it runs: ds-moe-ep top {folder}. Else run it again: infer.py ... "
            f"--resume --metrics {folder}."
        )
    ranks = tuple(sorted(_lines(RankMetrics, folder, RANKS_JSONL), key=lambda line: line.rank))
    loads = read_expert_loads(folder)
    windows = _lines(BalanceWindow, folder, BALANCE_JSONL)
    samples = SampleFile(_existing(folder, SAMPLES_JSONL), run.world_size).new_samples()
    metrics = Metrics(folder, run, ranks, tuple(samples), loads, windows)
    _check_is_one_job(metrics)
    return metrics


def read_run(folder: Path) -> Run:
    """Returns what is run.

    Raises:
        ConfigError: run.json is missing, damaged or of another version.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. {_HOW}")
    path = _existing(folder, RUN_JSON)
    content = read_json(path)
    if content.get("version") != VERSION:
        raise ConfigError(
            f"{path}: version={content.get('version')!r}: version {VERSION} is read here. Use "
            "the ds-moe-ep that the job was run with."
        )
    run = parse(Run, content, path)
    if len(run.hosts) != run.world_size:
        raise ConfigError(
            f"{path}: hosts names the hosts of {len(run.hosts)} ranks, plan.world_size is "
            f"{run.world_size}. Record the job again."
        )
    return run


class SampleFile:
    """Follows samples.jsonl while it grows: each call returns what came since the last one."""

    def __init__(self, path: Path, world_size: int) -> None:
        self._path = path
        self._world_size = world_size
        self._offset = 0
        self._line = 0

    def new_samples(self) -> list[Sample]:
        """Returns the samples of whole lines that were not there before; a cut one waits.

        Raises:
            ConfigError: A whole line is no sample, or of a rank that the job does not have.
        """
        try:
            with self._path.open("rb") as file:
                if file.seek(0, 2) < self._offset:  # a new job writes to the same folder
                    self._offset = self._line = 0
                file.seek(self._offset)
                content = file.read()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror}).") from None
        whole, line_end, _ = content.rpartition(b"\n")
        self._offset += len(whole) + len(line_end)
        return [self._parse(line) for line in whole.split(b"\n")] if line_end else []

    def _parse(self, line: bytes) -> Sample:
        self._line += 1
        source = Path(f"{self._path}:{self._line}")
        try:
            content: Any = json.loads(line)
        except (RecursionError, ValueError) as error:
            raise ConfigError(f"{source}: not valid JSON ({error}).") from None
        if not isinstance(content, dict):
            raise ConfigError(f"{source}: a JSON object ({{...}}) is needed.")
        sample = parse(Sample, content, source)
        if sample.rank >= self._world_size:
            raise ConfigError(
                f"{source}: rank={sample.rank}, but {RUN_JSON} is of {self._world_size} ranks. "
                "The files are of different jobs: record anew."
            )
        return sample


_Line = TypeVar("_Line", bound=Strict)


def _lines(section: type[_Line], folder: Path, name: str) -> tuple[_Line, ...]:
    path = _existing(folder, name)
    return tuple(parse(section, content, place) for place, content in read_json_lines(path))


def _existing(folder: Path, name: str) -> Path:
    path = folder / name
    if not path.is_file():
        raise ConfigError(f"{folder} has no {name}. {_HOW}")
    return path


def _check_is_one_job(metrics: Metrics) -> None:
    run, folder = metrics.run, metrics.folder
    ranks = [rank.rank for rank in metrics.ranks]
    _check(folder / RANKS_JSONL, "ranks", ranks, list(range(run.world_size)), "world_size")
    layers = list(metrics.expert_loads)
    _check(folder / EXPERTS_JSONL, "layers", layers, sorted(run.moe_layers), "moe_layers")
    num_experts = len(next(iter(metrics.expert_loads.values())))
    _check(folder / EXPERTS_JSONL, "experts", num_experts, run.num_experts, "num_experts")
    for number, window in enumerate(metrics.windows, start=1):
        path = Path(f"{folder / BALANCE_JSONL}:{number}")
        _check(path, "layers", len(window.layers), len(run.moe_layers), "moe_layers")


def _check(path: Path, what: str, found: object, wanted: object, origin: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"{path}: {what} {_short(found)}, but {origin} of {RUN_JSON} makes it "
            f"{_short(wanted)}. The files are of different jobs: record anew."
        )


def _short(value: object) -> str:
    if isinstance(value, Sequence) and len(value) > 8:
        return f"[{value[0]}, {value[1]}, ... {value[-1]}] ({len(value)} of them)"
    return str(value)
