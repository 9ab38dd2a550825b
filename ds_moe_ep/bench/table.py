"""What a table of the benchmark is made of; the tables are in modules of their own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.dist.groups import Job

__all__ = ["Result", "Table"]

Result = dict[str, Any]
"""One line of results, of what JSON can hold."""


@dataclass(frozen=True)
class Table:
    """A table, written by one command.

    Attributes:
        name: Its name on the command line.
        heading: Its heading in the document.
        add_arguments: Adds what it can be asked; ``--world``, the numbers of ranks, among it.
        to_markdown: Shows the results of all worlds.
        measure: Called on every rank of each world; rank 0's results count.
        measure_alone: In its place: called in this process, for which no ranks are launched.
        prepare: Called once before any rank starts, if there is anything to check or to write to
            the folder that they read.
        document: The file in docs/ that its section stands in.
        variant: Tells, by what it was asked, the ending of the section's name and of its heading
            where a section of its own is due on this machine; None where it is not.
    """

    name: str
    heading: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    to_markdown: Callable[[Sequence[Result]], str]
    measure: Callable[[argparse.Namespace, Job, Path], list[Result]] | None = None
    measure_alone: Callable[[argparse.Namespace, Path], list[Result]] | None = None
    prepare: Callable[[argparse.Namespace, Path], None] | None = None
    document: str = "benchmarks.md"
    variant: Callable[[argparse.Namespace], tuple[str, str] | None] = lambda args: None
