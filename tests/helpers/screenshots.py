"""Takes the screenshots of docs/report.md of a report: `python -m tests.helpers.screenshots`."""

import argparse
import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tests.helpers.browser import CHROMIUM_MISSING, find_chromium, open_browser

_HEIGHT, _COLOURS = 1560, 256


@dataclass(frozen=True)
class _View:
    """A part of the page as it is seen: its width, its colours, and the section at its top."""

    width: int
    is_dark: bool = False
    heading: str | None = None


_VIEWS = {
    "report-light": _View(940),
    "report-dark": _View(940, is_dark=True, heading="Balance"),
    "report-phone": _View(390),
}


def main() -> None:
    """Writes a PNG file of each view."""
    parser = argparse.ArgumentParser(
        description="Take screenshots of a report.", prog="screenshots"
    )
    parser.add_argument("report", type=Path, help="report.html, as ds-moe-ep report writes it")
    parser.add_argument("out", type=Path, help="folder for the pictures, docs/screenshots say")
    args = parser.parse_args()
    executable = find_chromium()
    if executable is None:
        parser.error(CHROMIUM_MISSING)
    with (
        tempfile.TemporaryDirectory() as profile,
        open_browser(executable, Path(profile)) as browser,
    ):
        for name, view in _VIEWS.items():
            browser.open(args.report, width=view.width, height=_HEIGHT, is_dark=view.is_dark)
            if view.heading is not None:
                browser.ask(
                    f"""[...document.querySelectorAll("section")].find(section =>
                    section.querySelector("h2").textContent == {view.heading!r}).scrollIntoView()"""
                )
            picture = Image.open(io.BytesIO(browser.screenshot())).quantize(_COLOURS)
            picture.save(args.out / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
