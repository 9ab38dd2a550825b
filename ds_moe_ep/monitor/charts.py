"""The charts of a report: which figures of a job are drawn, and how.

What all pictures have in common is in plots.py.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import mean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from ds_moe_ep.monitor.findings import kind_latencies, pass_parts
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.metrics_format import PARTS, PASS_KINDS
from ds_moe_ep.monitor.plots import COLOURS, NARROW, chart
from ds_moe_ep.monitor.units import time_of
from ds_moe_ep.monitor.verdicts import COLLECTIVE_NAMES, TARGETS

__all__ = [
    "expert_heat_map",
    "latency_histograms",
    "memory_bars",
    "rank_load_bars",
    "step_bars",
    "utilisation_line",
]

# Less than the mean, and more: colours that show on light and dark paper, by red, green, blue.
_LESS, _MORE = (0.16, 0.47, 0.84), (0.89, 0.36, 0.13)
_MOST_TIMES = 4.0  # from here on the colour is full
_BUCKETS_A_DOUBLING = 2
_MOST_POINTS = 200


def step_bars(metrics: Metrics) -> str:
    """Draws what a pass is made of: a bar for prefill, one for decode."""
    by_kind = {kind: pass_parts(metrics, kind) for kind in PASS_KINDS}
    shown = [kind for kind in PASS_KINDS if by_kind[kind]]

    def draw(figure: Figure, width: int) -> None:
        axes = figure.subplots()
        axes.grid(visible=False)
        for row, kind in enumerate(shown):
            whole, left = sum(by_kind[kind].values()), 0.0
            for part in PARTS:
                share = by_kind[kind][part] / whole
                axes.barh(
                    row, share, left=left, height=0.62, color=COLOURS[part],
                    edgecolor=COLOURS["surface"], linewidth=2, label=part if row == 0 else None,
                )  # fmt: skip
                left += share
            axes.text(0, row - 0.42, f"{kind}: {time_of(whole)} a pass", va="bottom")
        axes.set(xlim=(0, 1), ylim=(len(shown) - 0.6, -0.85), yticks=[])
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.spines[:].set_visible(False)
        columns = 3 if width == NARROW else len(PARTS)
        figure.legend(loc="outside lower center", ncols=columns, handlelength=1, handleheight=1)

    return chart("Time of a pass by part", draw, (70 + 75 * len(shown), 95 + 75 * len(shown)))


def rank_load_bars(metrics: Metrics) -> str:
    """Draws the rows that each rank computed, by their mean."""
    rows = [rank.expert_rows for rank in metrics.ranks]
    usual = mean(rows) or 1.0

    def draw(figure: Figure, width: int) -> None:
        axes = _bars(figure, [number / usual for number in rows])
        axes.axhline(1, color=COLOURS["ink"], linewidth=1)
        axes.set_ylim(0, max(1.15, 1.1 * max(rows) / usual))
        axes.set_ylabel("rows by their mean")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))

    return chart("Rows that each rank computed", draw, (220, 200))


def memory_bars(metrics: Metrics) -> str:
    """Draws the peak of each rank's memory against what was predicted."""
    peaks = [rank.peak_memory_bytes for rank in metrics.ranks]
    predicted = metrics.run.predicted_memory_bytes
    top = max([*peaks, predicted or 0]) or 1
    power = min(int(math.log2(top)) // 10 * 10, 40)
    unit, unit_bytes = {0: "B", 10: "KiB", 20: "MiB", 30: "GiB", 40: "TiB"}[power], 2**power

    def draw(figure: Figure, width: int) -> None:
        axes = _bars(figure, [peak / unit_bytes for peak in peaks])
        axes.set_ylabel(unit)
        axes.set_ylim(0, 1.2 * top / unit_bytes)
        if predicted is not None:
            axes.axhline(predicted / unit_bytes, color=COLOURS["accent"], dashes=(4, 3))

    return chart("Peak memory of each rank", draw, (220, 200))


def _bars(figure: Figure, values: Sequence[float]) -> Axes:
    axes = figure.subplots()
    width = 0.4 if len(values) <= 8 else 0.72
    axes.bar(range(len(values)), values, width=width, color=COLOURS["main"])
    axes.set_xlim(-0.6, len(values) - 0.4)
    axes.set_xlabel("rank")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16, min_n_ticks=1))
    axes.tick_params(axis="x", length=0)
    axes.spines["left"].set_visible(False)
    return axes


def expert_heat_map(metrics: Metrics) -> str:
    """Draws the tokens of each expert by the mean of its layer: a row a layer."""
    layers = list(metrics.expert_loads)
    tokens = np.array(list(metrics.expert_loads.values()), dtype=float)
    means = tokens.mean(axis=1, keepdims=True)
    pixels = _colours_of(np.divide(tokens, means, out=np.ones_like(tokens), where=means > 0))
    height = 90 + min(420, max(110, 13 * len(layers)))

    def draw(figure: Figure, width: int) -> None:
        axes, scale = figure.subplots(2, 1, height_ratios=(height - 60, 12))
        # An image of one pixel an expert, not tokens.size shapes: 58 layers of 256 take 2 KB.
        axes.imshow(pixels, aspect="auto", interpolation="none")
        axes.grid(visible=False)
        axes.set(xlabel="expert", ylabel="layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if width == NARROW else 12))
        step = -(-len(layers) // 16)
        axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
        axes.tick_params(axis="x", length=0)
        _draw_scale(scale)

    return chart("Tokens of each expert by the mean of its layer", draw, (height, height))


def _draw_scale(scale: Axes) -> None:
    """Draws what the colours of the heat map mean."""
    powers = np.linspace(-2, 2, 65)
    scale.imshow(_colours_of(2.0**powers)[None], aspect="auto", extent=(-2, 2, 0, 1))
    scale.grid(visible=False)
    scale.set_xticks((-2, -1, 0, 1, 2), ("1/4", "1/2", "mean", "2x", "4x"))
    scale.set_yticks([])
    scale.tick_params(axis="x", length=0)
    scale.spines[:].set_visible(False)


def _colours_of(factors: np.ndarray) -> np.ndarray:
    """Returns red, green, blue and opacity: paper at 1, full colour at a quarter and at 4 times."""
    powers = np.log2(np.maximum(factors, 1 / _MOST_TIMES))
    colours = np.where((powers < 0)[..., None], _LESS, _MORE)
    opacity = np.clip(np.abs(powers) / np.log2(_MOST_TIMES), 0, 1)
    return np.concatenate([colours, opacity[..., None]], axis=-1)


def latency_histograms(metrics: Metrics) -> str:
    """Draws how often collectives of each kind took how long, a small chart a kind."""
    kinds = [latency.kind for latency in kind_latencies(metrics)]
    counts = {kind: _buckets(metrics, kind) for kind in kinds}
    buckets = [bucket for counted in counts.values() for bucket in counted]

    def draw(figure: Figure, width: int) -> None:
        rows = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
        for axes, kind in zip(rows, kinds, strict=True):
            edges = [2.0 ** (bucket / _BUCKETS_A_DOUBLING) for bucket in sorted(counts[kind])]
            lower = [edge / 2 ** (1 / _BUCKETS_A_DOUBLING) for edge in edges]
            heights = [counts[kind][bucket] for bucket in sorted(counts[kind])]
            widths = [0.94 * (edge - low) for edge, low in zip(edges, lower, strict=True)]
            axes.bar(lower, heights, widths, align="edge", color=COLOURS["main"])
            axes.axvline(TARGETS.collective_s, color=COLOURS["accent"], dashes=(4, 3))
            axes.set_title(COLLECTIVE_NAMES[kind], loc="left", fontsize=12, color=COLOURS["ink"])
            axes.set(xscale="log", yticks=[])
            axes.grid(visible=False)
            axes.spines["left"].set_visible(False)
            axes.xaxis.set_minor_locator(NullLocator())
        low, high = min([*buckets, -21]), max([*buckets, -19])
        rows[-1].set_xlim(*(2.0 ** (edge / _BUCKETS_A_DOUBLING) for edge in (low - 2, high + 1)))
        rows[-1].xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_time(value)))
        rows[-1].set_xlabel(
            f"time of a collective; dashed: target {TARGETS.collective_s * 1e3:g} ms"
        )

    height = 60 + 85 * len(kinds)
    return chart("How long collectives took", draw, (height, height)) if kinds else ""


def _short_time(seconds: float) -> str:
    return time_of(seconds).replace(".00", "").replace(".0", "")


def _buckets(metrics: Metrics, kind: str) -> Counter[int]:
    """Returns how many collectives of all ranks ended up to each half doubling of a second."""
    counted: Counter[int] = Counter()
    for rank in metrics.ranks:
        if kind in rank.collectives:
            for edge_s, count in rank.collectives[kind].histogram:
                bucket = math.ceil(math.log2(max(edge_s, 1e-9)) * _BUCKETS_A_DOUBLING - 1e-6)
                counted[bucket] += int(count)
    return counted


def utilisation_line(metrics: Metrics) -> str:
    """Draws utilisation over time: the mean of all ranks, and a band from lowest to highest."""
    samples = metrics.samples
    if not samples:
        return ""
    length_s = max(max(sample.t_s for sample in samples) / _MOST_POINTS, 1.0)
    by_moment: defaultdict[int, list[float]] = defaultdict(list)
    for sample in samples:
        by_moment[int(sample.t_s / length_s)].append(min(sample.utilisation, 1.0))
    moments = sorted(by_moment)
    times_s = [(moment + 0.5) * length_s for moment in moments]

    def draw(figure: Figure, width: int) -> None:
        axes = figure.subplots()
        values = [by_moment[moment] for moment in moments]
        band = ([min(each) for each in values], [max(each) for each in values])
        axes.fill_between(times_s, *band, color=COLOURS["main"], alpha=0.22, linewidth=0)
        marker = "o" if len(moments) < 3 else None
        axes.plot(times_s, [mean(each) for each in values], color=COLOURS["main"], marker=marker)
        axes.axhline(TARGETS.utilisation, color=COLOURS["accent"], dashes=(4, 3))
        axes.set(ylim=(0, 1.04), xlim=(0, max(times_s) + length_s / 2), xlabel="s")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.spines["left"].set_visible(False)

    return chart("Utilisation over time", draw, (220, 200))
