"""A report as a browser shows it: on a page and on a phone, in light and in dark."""

from pathlib import Path

import pytest

from ds_moe_ep.cli import main
from tests.helpers.browser import CHROMIUM_MISSING, find_chromium, open_browser
from tests.helpers.metrics import large_metrics, small_metrics, write_metrics_folder

_CHROMIUM = find_chromium()
pytestmark = pytest.mark.skipif(_CHROMIUM is None, reason=CHROMIUM_MISSING)

_PAGE, _PHONE = 1100, 390

# What a reader must be able to tell from its background.
_TEXTS = ("h1", "p", ".verdicts .reason", ".verdicts .missed", "th", "td", "svg text", "footer")

_COLOUR_OF = """(selector) => {
    const element = [...document.querySelectorAll(selector)].find(e => e.getClientRects().length);
    const style = getComputedStyle(element);
    return element instanceof SVGElement ? style.fill : style.color;
}"""
# Of everything that can be seen: does it stick out of the page, or of the box that it scrolls in?
_STICKING_OUT = """[...document.querySelectorAll("main *")].filter(element => {
    const box = element.closest(".scroll, pre");
    const right = element.getBoundingClientRect().right;
    return right > innerWidth + 0.5 && !(box && box !== element);
}).map(element => element.outerHTML.slice(0, 100))"""
_CUT_TEXTS = """[...document.querySelectorAll("svg")].filter(svg => svg.getClientRects().length)
.flatMap(svg => {
    const box = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")].filter(text => {
        const own = text.getBoundingClientRect();
        return own.left < box.left - 1 || own.right > box.right + 1
            || own.top < box.top - 1 || own.bottom > box.bottom + 1;
    }).map(text => text.textContent);
})"""
_NUM_CHARTS = """[...document.querySelectorAll(".chart")].filter(chart => {
    const box = chart.getBoundingClientRect();
    return box.width > 250 && box.height > 80;
}).map(chart => chart.className)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(_CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture(scope="module", params=[small_metrics, large_metrics], ids=["small", "large"])
def report(request, tmp_path_factory) -> Path:
    folder = write_metrics_folder(tmp_path_factory.mktemp("metrics"), request.param())
    assert main(["report", str(folder)]) == 0
    return folder / "report.html"


@pytest.mark.parametrize("is_dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [_PAGE, _PHONE], ids=["page", "phone"])
def test_it_reads_well(browser, report, width, is_dark):
    browser.complaints.clear()
    browser.open(report, width=width, is_dark=is_dark)
    assert browser.complaints == []
    assert browser.ask("document.documentElement.scrollWidth") <= width
    assert browser.ask(_STICKING_OUT) == []
    assert browser.ask(_CUT_TEXTS) == []
    form = "narrow" if width == _PHONE else "wide"
    assert browser.ask(_NUM_CHARTS) == [f"chart {form}"] * 6

    paper = _luminance(browser.ask("getComputedStyle(document.body).backgroundColor"))
    assert paper < 0.05 if is_dark else paper > 0.9
    surface = browser.ask("getComputedStyle(document.querySelector('section')).backgroundColor")
    for selector in _TEXTS:
        colour = browser.ask(f"({_COLOUR_OF})({selector!r})")
        for ground in (paper, _luminance(surface)):
            assert _contrast(_luminance(colour), ground) >= 4.5, (selector, colour)


def test_bars_have_the_colour_of_the_scheme(browser, report):
    main_colour = []
    for is_dark in (False, True):
        browser.open(report, width=_PAGE, is_dark=is_dark)
        style = "getComputedStyle(document.documentElement).getPropertyValue('--main')"
        red, green, blue = (int(browser.ask(style).strip()[i : i + 2], 16) for i in (1, 3, 5))
        bars = f"""[...document.querySelectorAll(".wide svg path")].filter(path =>
            getComputedStyle(path).fill == "rgb({red}, {green}, {blue})").length"""
        # A bar a rank for rows and one for memory, besides those of the histograms.
        assert browser.ask(bars) >= 8
        main_colour.append((red, green, blue))
    assert main_colour[0] != main_colour[1]


def test_the_browser_hears_what_a_page_complains_of(browser, tmp_path):
    cases = {
        "console": "<script>console.error('no')</script>",
        "exception": "<script>throw new Error('no')</script>",
        "request": "<img src='missing.png'>",
        "policy": """<meta http-equiv="Content-Security-Policy" content="default-src 'none'">
            <img src='missing.png'>""",
    }
    for name, content in cases.items():
        page = tmp_path / f"{name}.html"
        page.write_text(f"<!DOCTYPE html><link rel='icon' href='data:,'>{content}")
        browser.complaints.clear()
        browser.open(page, width=_PAGE)
        assert browser.complaints, name
    browser.complaints.clear()


def _luminance(colour: str) -> float:
    """Returns the relative luminance of WCAG 2.2 of "rgb(1, 2, 3)"."""
    shares = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = (
        share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _contrast(one: float, other: float) -> float:
    low, high = sorted((one, other))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_that_of_the_standard():
    assert _contrast(_luminance("rgb(0, 0, 0)"), _luminance("rgb(255, 255, 255)")) == 21
    grey, white = _luminance("rgb(118, 118, 118)"), _luminance("rgb(255, 255, 255)")
    assert round(_contrast(grey, white), 2) == 4.54
