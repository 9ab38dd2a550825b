"""`bench bars`: the ratios that the recorded tables must reach, and whether they do.

They are computed from ``docs/benchmarks/*.json``; nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.bench.report import markdown_table, read_recorded
from ds_moe_ep.bench.table import Result
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.moe.dispatch import DISPATCHERS, TWO_LEVEL

__all__ = ["BARS", "DOCUMENT", "Bar", "to_markdown"]

DOCUMENT = "performance.md"
"""The file in docs/ that the table stands in."""

_SHOWN_ONE_BY_ONE = 6
_GPU_BARS = "[One rank of a large job](benchmarks.md#one-rank-of-a-large-job)"


@dataclass(frozen=True)
class Bar:
    """A ratio that every row which a bar is about must reach.

    Attributes:
        what: What is compared.
        against: With what.
        value: The ratio to reach.
        table: The recorded table, ``docs/benchmarks/TABLE.json``.
        is_about: Tells whether a row of the table counts.
        ratio: The ratio of a row.
        label: What tells the rows apart, if they are shown one by one.
        is_most: Whether the ratio must not be more, rather than not less.
    """

    what: str
    against: str
    value: float
    table: str
    is_about: Callable[[Result], bool]
    ratio: Callable[[Result], float]
    label: Callable[[Result], str] = lambda row: ""
    is_most: bool = False

    def is_met(self, ratio: float) -> bool:
        """Tells whether an unrounded ratio reaches the bar."""
        return ratio <= self.value if self.is_most else ratio >= self.value

    def show(self, ratio: float) -> str:
        """Rounds to as few digits, two or more, as stay on the ratio's side of the bar."""
        text, digits = f"{ratio:.2f}", 2
        while self.is_met(float(text)) != self.is_met(ratio):
            digits += 1
            text = f"{ratio:.{digits}f}"
        return text if self.is_met(ratio) else f"**{text}**"


def _layer(routing: str, tokens: Sequence[int], value: float) -> Bar:
    listed = ", ".join(map(str, tokens))
    return Bar(
        f"layer, 8 ranks, {routing}, {listed} tokens a rank",
        "DeepSpeed MoE",
        value,
        "layer",
        lambda row: (
            (row["world_size"], row["routing"]) == (8, routing) and row["tokens_per_rank"] in tokens
        ),
        lambda row: _median(row, "DeepSpeed MoE") / _median(row, "auto"),
    )


def _median(row: Result, side: str, of: str = "seconds") -> float:
    return float(row[of][side]["median"])


def _e2e(phase: str, num_ranks: int, peers: str, value: float) -> Bar:
    def seconds(row: Result, side: str) -> float:
        first = _median(row, side, "prefill_s")
        return first if phase == "prefill" else _median(row, side, "all_s") - first

    def ratio(row: Result) -> float:
        best = min(seconds(row, side) for side in row["all_s"] if side.startswith(peers))
        return best / seconds(row, "ours")

    return Bar(
        f"generation, {num_ranks} ranks, {phase}",
        "best of one process, two threads" if peers == "one process" else peers,
        value,
        "e2e",
        lambda row: row["world_size"] == num_ranks,
        ratio,
        lambda row: f"{row['batch']} prompts",
    )


def _auto(table: str, what: str) -> Bar:
    def ratio(row: Result) -> float:
        return _median(row, "auto") / min(
            _median(row, side) for side in row["seconds"] if side in DISPATCHERS
        )

    return Bar(
        what,
        "best single dispatcher of a row",
        1.1,
        table,
        lambda row: True,
        ratio,
        is_most=True,
    )


def _flat(row: Result) -> float:
    flat = [side for side in row["seconds"] if side in DISPATCHERS and side not in TWO_LEVEL]
    return min(_median(row, side) for side in flat) / _median(row, "auto")


def _bytes(side: str, table: str, ranks: str) -> Bar:
    return Bar(
        f"bytes, {side}, {ranks}",
        "each row once for each rank, and back",
        1.1,
        table,
        lambda row: True,
        lambda row: float(row["sent_bytes"][side] / row["least_bytes"]),
        is_most=True,
    )


_ALL_TOKENS = (1, 4, 16, 64, 256, 1024)

BARS = (
    _layer("uniform", (1, 4, 16), 2.0),
    _layer("uniform", (256, 1024), 1.3),
    _layer("zipf", _ALL_TOKENS, 3.0),
    _layer("all-to-one", _ALL_TOKENS, 3.0),
    _e2e("decode", 2, "transformers EP", 3.0),
    _e2e("decode", 4, "transformers EP", 4.5),
    _e2e("prefill", 2, "transformers EP", 2.5),
    _e2e("prefill", 4, "transformers EP", 4.0),
    _e2e("decode", 2, "one process", 1.2),
    _e2e("prefill", 2, "one process", 1.2),
    Bar(
        "layer, 64 ranks as 8 x 8, uniform, 1, 4, 16 tokens a rank",
        "best of flat collectives",
        2.0,
        "layer-hosts",
        lambda row: row["tokens_per_rank"] in (1, 4, 16),
        _flat,
    ),
    _auto("layer-ours", "auto, layer, our dispatchers alone"),
    _auto("layer", "auto, layer, among the peers"),
    _auto("layer-hosts", "auto, layer, 64 ranks as 8 x 8"),
    *(
        _bytes(side, table, ranks)
        for side in ("routed rows only", "auto")
        for table, ranks in (("scale", "2, 4, 8 ranks"), ("scale-hosts", "16, 64 ranks"))
    ),
)
"""What must be reached, in the order of the table."""


def to_markdown(folder: Path) -> str:
    """Returns the table of all bars.

    Args:
        folder: Where the recorded tables are, ``TABLE.json`` each.

    Raises:
        ConfigError: A table is not recorded, or has no row that a bar is about.
    """
    recorded = {name: read_recorded(folder, name) for name in dict.fromkeys(b.table for b in BARS)}
    rows = [_row(bar, recorded[bar.table]["results"]) for bar in BARS]
    days = ", ".join(f"{name} {each['measured_on']}" for name, each in recorded.items())
    return (
        f"{markdown_table(['what', 'against', 'bar', 'reached', ''], rows)}\n\n"
        "Ratios of medians. A bar is met if all its rows meet it before they are rounded; those "
        f"that miss are bold. Tables, and when they were recorded: {days}. The bars of one rank on "
        f"a GPU stand below its table, {_GPU_BARS}."
    )


def _row(bar: Bar, results: Sequence[Result]) -> list[str]:
    about = [result for result in results if bar.is_about(result)]
    if not about:
        raise ConfigError(
            f"{bar.table}.json has no row for the bar '{bar.what}'. Record the table again, with "
            "such rows."
        )
    ratios = [bar.ratio(result) for result in about]
    num_missed = sum(not bar.is_met(ratio) for ratio in ratios)
    if len(about) > _SHOWN_ONE_BY_ONE:
        reached = f"{bar.show(min(ratios))} to {bar.show(max(ratios))} in {len(about)} rows"
    else:
        labels = [bar.label(result) for result in about]
        shown = map(bar.show, ratios)
        reached = ", ".join(
            f"{who}: {what}" if who else what for who, what in zip(labels, shown, strict=True)
        )
    verdict = f"**not met** ({num_missed} of {len(about)})" if num_missed else "met"
    limit = f"at most {bar.value}" if bar.is_most else f"{bar.value}"
    return [bar.what, bar.against, limit, reached, verdict]
