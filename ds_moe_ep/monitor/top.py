"""`ds-moe-ep top`: a job in the terminal while it runs; keys choose what is seen.

What a job is doing is found out in live.py.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ds_moe_ep.monitor.live import LiveRun, Row, follow
from ds_moe_ep.monitor.metrics_format import BalanceWindow
from ds_moe_ep.monitor.units import few_digits, printable, size, span, time_of
from ds_moe_ep.monitor.verdicts import PERFECT_BALANCE, TARGETS

__all__ = ["top"]

_EVERY_S = 0.5
_SILENT_S = 15.0  # samples come once a second; a job that is starved may be late
_LINES_AROUND = 6  # two of heading, table head and foot, keys, and the cursor's
_NO_BALANCE = "balance -"
_KEYS = "q quit   r ranks   h hosts   arrows, space scroll"
_DOWN, _UP = ("j", "\x1b[B", "\x1bOB"), ("k", "\x1b[A", "\x1bOA")
_PAGE_DOWN, _PAGE_UP = (" ", "\x1b[6~"), ("b", "\x1b[5~")
_KEY = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)  # an arrow is several characters


def top(folder: Path) -> int:
    """Shows a job until it is over or the user has seen enough; without a terminal once.

    Args:
        folder: What was given to ``infer.py --metrics``.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: There is no job, or what it writes is damaged.
    """
    live = follow(folder)
    live.update()
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 120)
        console.print(_Screen(live, height=0).render())
        return 0
    signal.signal(signal.SIGTERM, lambda caught, frame: sys.exit(128 + caught))  # clean up first
    with contextlib.suppress(KeyboardInterrupt):
        _watch(live, console)
    live.update()
    console.print(_Screen(live, height=console.height).render())
    if live.is_over:
        command = shlex.join(["ds-moe-ep", "report", str(folder)])
        console.print(f"The job is over: {command}", soft_wrap=True, markup=False)
    return 0


def _watch(live: LiveRun, console: Console) -> None:
    screen = _Screen(live, console.height)
    with (
        _single_keys() as read_keys,
        Live(screen.render(), console=console, screen=True, auto_refresh=False) as shown,
    ):
        while not live.is_over:
            live.update()
            screen.height = console.height
            shown.update(screen.render(), refresh=True)
            for key in read_keys(_EVERY_S):
                if key in ("q", "Q"):
                    return
                screen.press(key)


class _Screen:
    """What is seen of a job: ranks or hosts, from one of them on.

    Args:
        live: The job.
        height: Lines of the terminal; 0: as many as it takes.
    """

    def __init__(self, live: LiveRun, height: int) -> None:
        self.height = height
        self._live = live
        self._by_host: bool | None = None  # until the user says which: ranks if they fit
        self._first = 0

    def press(self, key: str) -> None:
        """Does what a key asks for."""
        if key in ("r", "h"):
            self._by_host, self._first = key == "h", 0
        page = max(1, self.height - _LINES_AROUND)
        self._first += (key in _DOWN) - (key in _UP)
        self._first += page * ((key in _PAGE_DOWN) - (key in _PAGE_UP))

    def render(self) -> RenderableType:
        """Returns the screen."""
        live = self._live
        room = self.height - _LINES_AROUND if self.height else live.run.world_size
        room = max(1, room)
        ranks = live.ranks()
        by_host = len(ranks) > room if self._by_host is None else self._by_host
        rows = live.hosts() if by_host else ranks
        self._first = min(max(0, self._first), max(0, len(rows) - room))
        last = self._first + room
        parts: list[RenderableType] = [
            self._heading(),
            self._balance(),
            self._table(rows[self._first : last], by_host),
        ]
        if self.height:
            hidden = f"   {self._first + 1} to {min(last, len(rows))} of {len(rows)}"
            text = _KEYS + (hidden if len(rows) > room else "")
            parts.append(Text(text, style="dim", no_wrap=True, overflow="ellipsis"))
        return Group(*parts)

    def _heading(self) -> Text:
        live, run = self._live, self._live.run
        plan = run.plan
        text = Text(no_wrap=True, overflow="ellipsis")
        text.append(printable(run.model), style="bold")
        text.append(f"  EP{plan.ep_size} TP{plan.tp_size} PP{plan.pp_size} DP{plan.dp_size}")
        text.append(f"  {printable(run.device)}  {span(live.seconds)}")
        if live.is_over:
            text.append("  over", style="green")
        elif not live.seconds:
            text.append("  the first batch has not begun", style="yellow")
        elif live.silent_s > _SILENT_S:
            silent = f"  silent for {span(live.silent_s)}: the job may have ended or hang"
            text.append(silent, style="yellow")
        return text

    def _balance(self) -> Text:
        window = self._live.balance
        if window is None:
            return Text(_NO_BALANCE, style="dim", no_wrap=True, overflow="ellipsis")
        text = Text("balance ", no_wrap=True, overflow="ellipsis")
        text.append_text(_judged(window.overall))
        text.append("   worst layer ")
        text.append_text(_judged(min(window.layers)))
        text.append(f" ({_worst_layer(self._live.run.moe_layers, window)})")
        text.append(f"   passes {window.first_step:,} to {window.last_step:,}", style="dim")
        return text

    def _table(self, rows: list[Row], by_host: bool) -> Table:
        table = Table(box=None, pad_edge=False, show_footer=True, header_style="dim")
        total = self._live.total()
        names = ("util", "memory", "tokens/s", "done", "queue", "batch", "step", "collective")
        table.add_column("host (ranks)" if by_host else "rank host", "all", no_wrap=True)
        for name, foot in zip(names, _cells(total), strict=True):
            table.add_column(name, foot, justify="right", no_wrap=True)
        table.add_column("at", overflow="ellipsis", no_wrap=True)
        for row in rows:
            util, *others = _cells(row)
            is_good = row.utilisation >= TARGETS.utilisation
            cells = [Text(util, style="green" if is_good else ""), *map(Text, others)]
            table.add_row(Text(row.name), *cells, Text(row.at))
        return table


def _cells(row: Row) -> tuple[str, ...]:
    return (
        f"{min(row.utilisation, 1.0):.0%}",
        size(row.memory_bytes),
        few_digits(row.tokens_per_s),
        f"{row.prompts_done:,}",
        f"{row.prompts_queued:,}",
        f"{row.batch_size:,}",
        f"{row.step:,}",
        time_of(row.collective_s) if row.collective_s else "-",
    )


def _judged(balancedness: float) -> Text:
    return Text(f"{balancedness:.2f}", style="green" if balancedness >= PERFECT_BALANCE else "")


def _worst_layer(moe_layers: Sequence[int], window: BalanceWindow) -> int:
    return moe_layers[min(range(len(moe_layers)), key=window.layers.__getitem__)]


_ReadKeys = Callable[[float], list[str]]


@contextlib.contextmanager
def _single_keys() -> Iterator[_ReadKeys]:
    """Hands over keys as they are pressed, and does not echo them, while it is open.

    Yields:
        A function that waits so many seconds for keys, and returns them.
    """
    if not sys.stdin.isatty():
        yield _no_keys
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield lambda seconds: _keys(descriptor, seconds)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _no_keys(seconds: float) -> list[str]:
    time.sleep(seconds)
    return []


def _keys(descriptor: int, seconds: float) -> list[str]:
    if not select.select([descriptor], [], [], seconds)[0]:
        return []
    pressed = os.read(descriptor, 1024).decode(errors="replace")
    return _KEY.findall(pressed) or ["q"]  # nothing at all: the terminal has gone
