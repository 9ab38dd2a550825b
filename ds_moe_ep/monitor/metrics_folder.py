"""The folder of ``--metrics``: read strictly, as that of one job; and tried before one begins.

What stands in it is in metrics_format.py; what the figures say is not decided here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ds_moe_ep.bringup.report import BRINGUP_JSONL, PHASES
from ds_moe_ep.config.strict import Strict, parse, parse_json, read_json, read_json_lines
from ds_moe_ep.errors import ConfigError, InputError
from ds_moe_ep.monitor.metrics_format import (
    BALANCE_JSONL,
    EXPERTS_JSONL,
    RANKS_JSONL,
    RUN_JSON,
    SAMPLES_JSONL,
    VERSION,
    BalanceWindow,
    BringUpPhase,
    RankMetrics,
    Run,
    Sample,
)
from ds_moe_ep.monitor.recorded import read_expert_loads

__all__ = [
    "GrowingFile",
    "Metrics",
    "check_metrics_folder",
    "not_writable",
    "read_metrics",
    "read_run",
]

_Line = TypeVar("_Line", bound=Strict)
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
        bring_up: What was looked at before the first batch.
    """

    folder: Path
    run: Run
    ranks: tuple[RankMetrics, ...]
    samples: tuple[Sample, ...]
    expert_loads: dict[int, tuple[int, ...]]
    windows: tuple[BalanceWindow, ...]
    bring_up: tuple[BringUpPhase, ...]


def read_metrics(folder: Path) -> Metrics:
    """Returns what a finished job recorded.

    Raises:
        ConfigError: A file is missing, damaged, of another version, or of another job than the
            others.
    """
    run = read_run(folder)
    if not (folder / RANKS_JSONL).is_file():
        quoted = shlex.quote(str(folder))
        raise ConfigError(
            f"{folder} has no {RANKS_JSONL}: the job has not ended, or was stopped before it did. "
            f"Follow it while it runs: ds-moe-ep top {quoted}. Else run it again: infer.py ... "
            f"--resume --metrics {quoted}."
        )
    ranks = tuple(sorted(_lines(RankMetrics, folder, RANKS_JSONL), key=lambda line: line.rank))
    loads = read_expert_loads(folder)
    windows = _lines(BalanceWindow, folder, BALANCE_JSONL)
    samples = GrowingFile(_existing(folder, SAMPLES_JSONL), Sample, run).new_lines()
    bring_up = _lines(BringUpPhase, folder, BRINGUP_JSONL)
    metrics = Metrics(folder, run, ranks, tuple(samples), loads, windows, bring_up)
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
            "the ds-moe-ep that the job was run with, or run it again."
        )
    run = parse(Run, content, path)
    if len(run.hosts) != run.world_size:
        raise ConfigError(
            f"{path}: hosts names the hosts of {len(run.hosts)} ranks, plan.world_size is "
            f"{run.world_size}. Record the job again."
        )
    return run


def check_metrics_folder(path: Path) -> None:
    """Finds out whether a `FolderWriter` could write there, and leaves no trace.

    Args:
        path: The folder, which need not be there.

    Raises:
        InputError: It could not.
    """
    made: list[Path] = []
    try:
        for folder in (*reversed(path.parents), path):
            if not folder.exists():
                folder.mkdir()
                made.append(folder)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(b"\n")  # a full disk takes empty files
            file.flush()
        for name in (SAMPLES_JSONL, BALANCE_JSONL):
            if (path / name).exists():  # perhaps another user's, in a folder that is shared
                (path / name).open("a").close()
    except OSError as error:
        raise InputError(not_writable(path, error)) from None
    finally:
        for folder in reversed(made):
            with contextlib.suppress(OSError):  # another job has put something there
                folder.rmdir()


def not_writable(path: Path, error: OSError) -> str:
    """Says why a metrics folder cannot be written, and what to do."""
    return f"{path}: cannot be written ({error.strerror}). Name another folder with --metrics."


class GrowingFile(Generic[_Line]):
    """Follows a file while a job adds lines to it: each call returns what came since the last one.

    Args:
        path: The file.
        section: What stands on each line.
        run: The job that is to have written it.
    """

    def __init__(self, path: Path, section: type[_Line], run: Run) -> None:
        self._path, self._section, self._run = path, section, run
        self._inode = 0
        self._offset = self._line = 0

    def new_lines(self) -> list[_Line]:
        """Returns the whole lines that were not there before; a cut one waits.

        Raises:
            ConfigError: A whole line is damaged, or of another job.
        """
        try:
            with self._path.open("rb") as file:
                inode, size = os.fstat(file.fileno()).st_ino, file.seek(0, os.SEEK_END)
                if inode != self._inode or size < self._offset:  # another took its place
                    self._inode, self._offset, self._line = inode, 0, 0
                file.seek(self._offset)
                content = file.read()
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be read ({error.strerror}).") from None
        whole, line_end, _ = content.rpartition(b"\n")
        self._offset += len(whole) + len(line_end)
        return [self._parse(line) for line in whole.split(b"\n")] if line_end else []

    def _parse(self, line: bytes) -> _Line:
        self._line += 1
        source = Path(f"{self._path}:{self._line}")
        parsed = parse(self._section, parse_json(line, source), source)
        _check_line(source, parsed, self._run)
        return parsed


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
    phases = [phase.phase for phase in metrics.bring_up]
    if phases != list(range(1, len(PHASES) + 1)):
        raise ConfigError(
            f"{folder / BRINGUP_JSONL}: phases {phases}, but a job that has run went through 1 to "
            f"{len(PHASES)}. The files are of different jobs: record anew."
        )
    num_experts = len(next(iter(metrics.expert_loads.values())))
    _check(folder / EXPERTS_JSONL, "experts", num_experts, run.num_experts, "num_experts")
    for number, window in enumerate(metrics.windows, start=1):
        _check_line(Path(f"{folder / BALANCE_JSONL}:{number}"), window, run)


def _check_line(source: Path, line: Strict, run: Run) -> None:
    if isinstance(line, Sample) and line.rank >= run.world_size:
        raise ConfigError(
            f"{source}: rank={line.rank}, but {RUN_JSON} is of {run.world_size} ranks. "
            "The files are of different jobs: record anew."
        )
    if isinstance(line, BalanceWindow):
        _check(source, "layers", len(line.layers), len(run.moe_layers), "moe_layers")


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
