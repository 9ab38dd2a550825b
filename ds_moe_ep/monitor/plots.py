"""Draws the charts of a report as SVG that takes its colours and fonts from the page around it.

What is drawn is worked out in charts.py; no file is written and no window opened.

SVG by matplotlib, not an inlined plotly: a report of 64 ranks is 0.2 MB, has no script that could
fail or be blocked, and prints. Colours become variables of the page's style sheet, so the same
picture serves light and dark mode.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html import escape
from typing import Any

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

__all__ = ["COLOURS", "NARROW", "WIDE", "chart"]

WIDE, NARROW = 800, 340
"""Widths that each chart is drawn for, in CSS pixels: a page, and a phone."""

_ROLES = (
    "ink",
    "soft",
    "grid",
    "surface",
    "main",
    "accent",
    "attention",
    "router",
    "dispatch",
    "experts",
    "combine",
    "other",
)
# Colours that stand for a variable of the style sheet until the picture is drawn.
COLOURS = {role: f"#fe{number:02x}fd" for number, role in enumerate(_ROLES, start=1)}
"""By role, what to give to matplotlib as a colour."""

_POINTS_PER_INCH = 72  # SVG's unit in matplotlib is a point; here it becomes a CSS pixel

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: selectable, small, in the page's font
    "svg.image_inline": True,
    "image.composite_image": False,
    "font.size": 12,
    "font.family": "DejaVu Sans",  # comes with matplotlib; wider than what pages use, so all fits
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["soft"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid.axis": "y",
    "axes.grid": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["soft"],
    "ytick.color": COLOURS["grid"],
    "ytick.labelcolor": COLOURS["soft"],
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 12,
}


def chart(title: str, draw: Callable[[Figure, int], None], heights: tuple[int, int]) -> str:
    """Draws a chart twice, for a page and for a phone; the style sheet shows one of them.

    Args:
        title: What a screen reader says of it.
        draw: Draws on an empty figure; told its width in CSS pixels.
        heights: Of both, in CSS pixels.

    Returns:
        HTML.
    """
    drawn = zip(("wide", "narrow"), (WIDE, NARROW), heights, strict=True)
    return "".join(
        f'<div class="chart {name}">{_svg(title, draw, width, height)}</div>'
        for name, width, height in drawn
    )


def _svg(title: str, draw: Callable[[Figure, int], None], width: int, height: int) -> str:
    # The salt keeps ids, of clip paths say, apart from those of other pictures on the page.
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": f"{title} {width}"}):
        figure = Figure(
            figsize=(width / _POINTS_PER_INCH, height / _POINTS_PER_INCH), layout="constrained"
        )
        figure.patch.set_alpha(0)
        draw(figure, width)
        text = io.StringIO()
        FigureCanvasSVG(figure).print_svg(text, metadata={"Date": None})
    return _for_page(text.getvalue(), title, width, height)


def _for_page(svg: str, title: str, width: int, height: int) -> str:
    """Takes off what is for a file of its own, and puts in the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(
        r"<svg [^>]*>",
        f'<svg role="img" aria-label="{escape(title)}" viewBox="0 0 {width} {height}">',
        svg,
        count=1,
    )
    svg = re.sub(r"<g id=\"[^\"]*\"", "<g", svg)  # the same in every picture, and never referred to
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)
    for role, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{role})")
    return re.sub(r">\s+<", "><", svg)
