"""What a phase of the bring-up found: checks with their verdicts, as text and as JSON.

What is checked, and against which target, is the phases' own business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.errors import ResourceError
from ds_moe_ep.whole_file import write_lines

__all__ = [
    "BRINGUP_JSONL",
    "FAIL",
    "PASS",
    "PHASES",
    "WARN",
    "Check",
    "PhaseReport",
    "judged",
    "write_jsonl",
]

BRINGUP_JSONL = "bringup.jsonl"

PASS, WARN, FAIL = "pass", "warn", "fail"
_ORDER = (PASS, WARN, FAIL)

PHASES = (
    "place experts",
    "configure communication",
    "optimise batch distribution",
    "fine-tune memory",
)
"""The phases, in order; phase 1 is the first."""

_NAME_WIDTH = 14


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What, in a word or two.
        verdict: ``pass``, ``warn`` or ``fail``.
        reason: What was found, with the numbers; of what is not passed also why and the way out.
        measured: The figure that was judged, if it is one.
        target: What it was judged against.
        unit: Unit of both.
    """

    name: str
    verdict: str
    reason: str
    measured: float | None = None
    target: float | None = None
    unit: str = ""


def judged(
    name: str, measured: float, target: float, unit: str, reason: str, *, missed: str = ""
) -> Check:
    """Returns a check that warns where a figure is above its target.

    Args:
        name: What was measured.
        measured: The figure.
        target: The most that is good.
        unit: Of both.
        reason: What was found.
        missed: What is added to the reason where the target is missed.
    """
    is_good = measured <= target
    text = reason if is_good else f"{reason}. {missed}"
    return Check(name, PASS if is_good else WARN, text, measured, target, unit)


@dataclass(frozen=True)
class PhaseReport:
    """The checks of one phase, or of a part of it that is done by itself."""

    number: int
    checks: tuple[Check, ...]
    seconds: float = 0.0
    part: str = ""

    @property
    def name(self) -> str:
        """What the phase is called."""
        return PHASES[self.number - 1] + (f", {self.part}" if self.part else "")

    @property
    def verdict(self) -> str:
        """The worst verdict of its checks."""
        return max((check.verdict for check in self.checks), key=_ORDER.index, default=PASS)

    @property
    def failed(self) -> list[Check]:
        """The checks that end the bring-up."""
        return [check for check in self.checks if check.verdict == FAIL]

    def to_text(self) -> str:
        """Returns the phase as a line, and a line for each check below it."""
        head = f"[{self.number}/{len(PHASES)}] {self.name}: {self.verdict} ({self.seconds:.2f} s)"
        lines = [
            f"      {check.verdict}  {check.name:<{_NAME_WIDTH}}  {check.reason}"
            for check in self.checks
        ]
        return "\n".join([head, *lines])

    def to_dict(self) -> dict[str, Any]:
        """Returns the phase as it is written to ``bringup.jsonl``."""
        return {
            "phase": self.number,
            "name": self.name,
            "verdict": self.verdict,
            "seconds": round(self.seconds, 4),
            "checks": [asdict(check) for check in self.checks],
        }


def write_jsonl(path: Path, reports: Sequence[PhaseReport]) -> None:
    """Writes a line a phase, in one step, into a folder that is made if it is not there.

    Raises:
        ResourceError: It cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_lines(path, (json.dumps(report.to_dict()) + "\n" for report in reports))
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}). Name another folder with --metrics."
        ) from error
