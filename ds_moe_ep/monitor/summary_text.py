"""The summary of a job for a terminal: the verdicts, and where time goes.

The whole of it is in the HTML report, see page.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ds_moe_ep.monitor.findings import pass_parts, slow_rank
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.metrics_format import PASS_KINDS
from ds_moe_ep.monitor.page import bring_up_told, key_figures, title
from ds_moe_ep.monitor.units import time_of
from ds_moe_ep.monitor.verdicts import Verdict

__all__ = ["summary_text"]

_WIDTH = 96
_STATES = {"met": "met", "missed": "missed", "open": "-"}


def summary_text(metrics: Metrics, verdicts: Sequence[Verdict]) -> str:
    """Returns the summary as text."""
    figures = ", ".join(f"{name} {figure}" for name, figure in key_figures(metrics).items())
    lines = [title(metrics), *textwrap.wrap(figures, _WIDTH), ""]
    for verdict in verdicts:
        measured = verdict.measured or "not measured"
        lines.append(
            f"{_STATES[verdict.state]:>6}  {verdict.name:<24}  {measured:<24}  {verdict.target}"
        )
        lines += _indented(verdict.reason)
    lines.append("")
    for kind in PASS_KINDS:
        if parts := pass_parts(metrics, kind):
            whole = sum(parts.values())
            shares = ", ".join(f"{part} {seconds / whole:.0%}" for part, seconds in parts.items())
            lines += textwrap.wrap(f"{kind} pass {time_of(whole)}: {shares}", _WIDTH)
    lines += textwrap.wrap(f"bring-up: {bring_up_told(metrics)}", _WIDTH)
    if slow := slow_rank(metrics):
        lines += textwrap.wrap(f"slowest: {slow}", _WIDTH)
    return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
