"""Where results go: JSON for programs, and a section of a document in docs/ for readers.

A section stands between two marks and is replaced as a whole, so the figures in it are those of one
command on one machine on one day.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ds_moe_ep import __version__
from ds_moe_ep.config.strict import read_json
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.local_machine import num_usable_cores
from ds_moe_ep.whole_file import write_lines

__all__ = [
    "Report",
    "describe_machine",
    "markdown_table",
    "read_recorded",
    "with_range",
    "write_section",
]

_PACKAGES = ("torch", "deepspeed", "transformers", "accelerate", "safetensors")
_GIB = 1 << 30


@dataclass(frozen=True)
class Report:
    """The results of one table.

    Attributes:
        table: Its name on the command line.
        heading: Its heading in the document.
        command: What wrote it.
        text: The results for readers, in Markdown.
        results: The results for programs.
        document: The file that the section stands in.
    """

    table: str
    heading: str
    command: str
    text: str
    results: Sequence[dict[str, Any]]
    machine: dict[str, str] = field(default_factory=lambda: describe_machine())
    measured_on: str = field(default_factory=lambda: date.today().isoformat())
    document: str = "benchmarks.md"

    def to_markdown(self) -> str:
        """Returns the section, without its marks."""
        machine = ", ".join(self.machine.values())
        return (
            f"## {self.heading}\n\n{self.text}\n\n"
            f"Measured on {self.measured_on}: {machine}.\n\n```bash\n{self.command}\n```"
        )

    def write(self, folder: Path) -> None:
        """Writes ``benchmarks/TABLE.json`` and the table's section of its document."""
        data = folder / "benchmarks" / f"{self.table}.json"
        data.parent.mkdir(parents=True, exist_ok=True)
        write_lines(data, [json.dumps(asdict(self), indent=1), "\n"])
        write_section(folder / self.document, self.table, self.to_markdown())


def read_recorded(folder: Path, table: str) -> dict[str, Any]:
    """Returns what `Report.write` wrote for programs.

    Args:
        folder: Where recorded tables are, ``TABLE.json`` each.
        table: Its name.

    Raises:
        ConfigError: It is not there, or not JSON.
    """
    path = folder / f"{table}.json"
    if not path.exists():
        raise ConfigError(f"{path} is not there. docs/benchmarks.md has the command for it.")
    return read_json(path)


def write_section(document: Path, name: str, section: str) -> None:
    """Replaces the section of a document that is marked with `name`, or adds it at the end."""
    before = document.read_text(encoding="utf-8") if document.exists() else "# Benchmarks\n"
    write_lines(document, [_with_section(before, name, section)])


def _with_section(document: str, table: str, section: str) -> str:
    begin, end = f"<!-- bench {table} -->", f"<!-- end of bench {table} -->"
    marked = f"{begin}\n{section}\n{end}"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if pattern.search(document):
        return pattern.sub(lambda found: marked, document)
    return f"{document.rstrip()}\n\n{marked}\n"


def describe_machine() -> dict[str, str]:
    """Says what this machine is and which versions it runs."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = [f"{name} {version(name)}" for name in _PACKAGES]
    return {
        "gpus": f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU",
        "cpu": f"{num_usable_cores()} cores of {_cpu_name()}",
        "memory": f"{memory_bytes / _GIB:.0f} GiB",
        "python": f"Python {platform.python_version()}",
        "versions": ", ".join(versions),
        "ds_moe_ep": f"ds_moe_ep {__version__}",
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table; all columns but the first are aligned to the right."""
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def with_range(spread: dict[str, float], *, scale: float = 1.0, digits: int = 2) -> str:
    """Returns a median with its least and most, of the fields of a `Spread`."""
    median, least, most = (f"{scale * spread[key]:.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} ({least} to {most})"
