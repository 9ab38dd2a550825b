"""Reading a metrics folder, refusing a damaged one by name, and what the report says of it."""

import copy
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import pytest

from ds_moe_ep.cli import main
from ds_moe_ep.engine.summary import RankSummary
from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.metrics_folder import GrowingFile, read_metrics, read_run
from ds_moe_ep.monitor.metrics_format import RankMetrics, Sample
from ds_moe_ep.monitor.page import page
from ds_moe_ep.monitor.summary_text import summary_text
from ds_moe_ep.monitor.units import few_digits, printable, size, span, time_of, times
from ds_moe_ep.monitor.verdicts import judge
from tests.helpers.metrics import large_metrics, small_metrics, write_metrics_folder


def _report(folder, capsys):
    code = main(["report", str(folder)])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def _written(tmp_path, change=lambda files: None):
    files = copy.deepcopy(small_metrics())
    change(files)
    return write_metrics_folder(tmp_path / "metrics", files)


# Reading


def test_ranks_come_in_their_order_whatever_that_of_the_lines(tmp_path):
    folder = _written(tmp_path, lambda files: files["metrics.jsonl"].reverse())
    assert [rank.rank for rank in read_metrics(folder).ranks] == [0, 1, 2, 3]


def test_samples_may_be_cut_after_any_byte(tmp_path):
    path = _written(tmp_path) / "samples.jsonl"
    run = read_run(path.parent)
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for end in range(start, len(whole)):
        path.write_bytes(whole[:end])
        assert len(GrowingFile(path, Sample, run).new_lines()) == 39
    path.write_bytes(whole)
    assert len(GrowingFile(path, Sample, run).new_lines()) == 40


def test_samples_are_followed_line_by_line_and_from_the_start_of_a_new_job(tmp_path):
    path = _written(tmp_path) / "samples.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"")
    file = GrowingFile(path, Sample, read_run(path.parent))
    assert file.new_lines() == []
    path.write_bytes(lines[0] + lines[1][:20])
    assert [sample.rank for sample in file.new_lines()] == [0]
    path.write_bytes(b"".join(lines[:3]))
    assert [sample.rank for sample in file.new_lines()] == [1, 2]
    path.write_bytes(lines[3])
    assert [sample.rank for sample in file.new_lines()] == [3]


def test_a_line_of_a_rank_may_have_all_that_a_job_sums_up():
    summed = {field.name for field in dataclasses.fields(RankSummary)}
    assert summed - RankMetrics.model_fields.keys() == set()


def _drop_line(files):
    del files["metrics.jsonl"][2]


def _other_layers(files):
    files["experts.jsonl"][0]["layer"] = 0


def _other_experts(files):
    for line in files["experts.jsonl"]:
        line["tokens_per_expert"].pop()


_FAULTS = {
    "version": (
        lambda files: files["run.json"].update(version=1),
        "run.json: version=1: version 2 is read here. Use the ds-moe-ep that the job was run with, "
        "or run it again.",
    ),
    "unknown key": (
        lambda files: files["run.json"].update(dipatcher="x"),
        "run.json: unknown key 'dipatcher' (did you mean 'dispatcher'?)",
    ),
    "unknown key in a list": (
        lambda files: files["bringup.jsonl"][0]["checks"][0].update(verdikt="pass"),
        "bringup.jsonl:1: unknown key 'checks.0.verdikt' (did you mean 'verdict'?)",
    ),
    "missing key": (
        lambda files: files["metrics.jsonl"][1].pop("comm_s"),
        "metrics.jsonl:2: comm_s is missing",
    ),
    "wrong type": (
        lambda files: files["metrics.jsonl"][1].update(comm_s="3"),
        "metrics.jsonl:2: comm_s='3'",
    ),
    "not a number": (
        lambda files: files["metrics.jsonl"][0].update(run_s=float("nan")),
        "metrics.jsonl:1: run_s=nan",
    ),
    "negative": (
        lambda files: files["samples.jsonl"][4].update(memory_bytes=-1),
        "samples.jsonl:5: memory_bytes=-1",
    ),
    "unknown kind": (
        lambda files: files["metrics.jsonl"][0]["collectives"].update(broadcast={}),
        "metrics.jsonl:1: collectives.broadcast",
    ),
    "no moment": (
        lambda files: files["run.json"].update(started_at="2026-11-25T09:00:00"),
        "run.json: started_at='2026-11-25T09:00:00': Value error, a moment with its offset",
    ),
    "hosts": (
        lambda files: files["run.json"].update(hosts=["node-a"]),
        "run.json: hosts names the hosts of 1 ranks, plan.world_size is 4",
    ),
    "a rank is missing": (
        _drop_line,
        "metrics.jsonl: ranks [0, 1, 3], but world_size of run.json makes it [0, 1, 2, 3]",
    ),
    "a rank too many": (
        lambda files: files["samples.jsonl"][0].update(rank=4),
        "samples.jsonl:1: rank=4, but run.json is of 4 ranks",
    ),
    "other layers": (
        _other_layers,
        "experts.jsonl: layers [0, 3], but moe_layers of run.json makes it [1, 3]",
    ),
    "other experts": (
        _other_experts,
        "experts.jsonl: experts 7, but num_experts of run.json makes it 8",
    ),
    "a bring-up that failed": (
        lambda files: files["bringup.jsonl"].pop(),
        "bringup.jsonl: phases [1, 2, 3], but a job that has run went through 1 to 4.",
    ),
    "other windows": (
        lambda files: files["balance.jsonl"][1].update(layers=[1.0]),
        "balance.jsonl:2: layers 1, but moe_layers of run.json makes it 2",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_damaged_file_is_refused_by_name(tmp_path, capsys, fault):
    change, says = _FAULTS[fault]
    code, out, err = _report(_written(tmp_path, change), capsys)
    assert (code, out) == (2, "")
    assert err.startswith(f"ConfigError: {tmp_path / 'metrics'}/{says}"), err
    assert not (tmp_path / "metrics" / "report.html").exists()


@pytest.mark.parametrize("name", small_metrics())
@pytest.mark.parametrize("content", [b"{\n", b"[]\n", b"\xff\n", b'{"rank": 1, "rank": 2}\n'])
def test_broken_json_is_refused_by_name(tmp_path, name, content):
    folder = _written(tmp_path)
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{re.escape(str(folder / name))}:") as refused:
        read_metrics(folder)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("name", small_metrics())
def test_a_missing_file_is_named_with_what_writes_it(tmp_path, capsys, name):
    folder = _written(tmp_path)
    (folder / name).unlink()
    code, _, err = _report(folder, capsys)
    assert code == 2
    assert f"{folder} has no {name}" in err
    assert "infer.py ... " in err
    assert ("ds-moe-ep top" in err) == (name == "metrics.jsonl")


def test_a_folder_that_is_not_there(tmp_path, capsys):
    code, _, err = _report(tmp_path / "none", capsys)
    assert code == 2
    assert "there is no such folder. Name a folder that a finished job wrote" in err


def test_a_report_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    out = tmp_path / "none" / "report.html"
    assert main(["report", str(_written(tmp_path)), "--out", str(out)]) == 2
    assert "mkdir -p" in capsys.readouterr().err


# What is shown


class _Elements(HTMLParser):
    """Counts tags, checks that they are closed, and collects ids, links and the text."""

    _EMPTY = ("meta", "link")

    def __init__(self, html):
        super().__init__()
        self.tags, self.ids, self.links, self.text, self._open = [], [], [], [], []
        self.feed(html)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in self._EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _page(folder):
    metrics = read_metrics(folder)
    return page(metrics, judge(metrics))


@pytest.fixture(scope="module")
def large_page(tmp_path_factory):
    return _page(write_metrics_folder(tmp_path_factory.mktemp("large"), large_metrics()))


def test_the_page_is_whole_and_needs_nothing_else(large_page):
    html = large_page
    elements = _Elements(html)
    assert "script" not in elements.tags
    assert len(elements.ids) == len(set(elements.ids))
    within = {f"#{id}" for id in elements.ids}
    assert {link for link in elements.links if not link.startswith("data:")} <= within
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(elements.ids)
    assert not re.findall(r"https?://(?!www\.w3\.org/)", html)
    pictures = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(pictures) == 2 * 6  # for a page and for a phone
    for picture in pictures:
        names = 'xmlns:xlink="http://www.w3.org/1999/xlink"'
        ElementTree.fromstring(picture.replace("<svg", f"<svg {names}", 1))
    assert len(html) < 400_000


def test_colours_and_fonts_are_those_of_the_page(large_page):
    html = large_page
    style = html[html.index("<style>") : html.index("</style>")]
    used = set(re.findall(r"var\((--[a-z]+)\)", html))
    for scheme in style.split("prefers-color-scheme: dark"):
        assert used <= set(re.findall(r"(--[a-z]+):", scheme))
    drawn = html[html.index("</style>") :]
    assert set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", drawn)) <= {"#ffffff"}  # clip paths


def test_what_stands_in_files_is_text(tmp_path):
    evil = "<script>alert(1)</script>&amp;\"'"

    def change(files):
        files["run.json"] |= {
            "model": evil,
            "model_type": evil,
            "device": evil,
            "dispatcher": evil,
            "dtype": evil,
            "command": [evil],
            "versions": {evil: evil},
            "hosts": [evil] * 4,
        }
        for rank in files["metrics.jsonl"]:
            rank |= {"host": evil, "dispatcher": evil}

    elements = _Elements(_page(_written(tmp_path, change)))
    assert "script" not in elements.tags
    # Title, heading, model, its type, device, dispatcher, dtype, two of versions, four hosts, and
    # the host of the slow rank.
    assert "".join(elements.text).count("alert(1)") == 2 + 6 + 5 + 1 + 1


def test_the_page_shows_what_was_found(tmp_path):
    text = " ".join(" ".join(_Elements(_page(_written(tmp_path))).text).split())
    for part in (
        "tiny & <b> on 4 CPU ranks",
        "2026-11-25 09:00 UTC. EP4 TP1 PP1 DP1 on 2 hosts, float32, batches sharded.",
        "0 of 5 that this run can show are met.",
        "Slowest: rank 3 (node-b): the others wait 2.00 s for it, 20% of the run",
        "skewed router: expert 7 of layer 3 takes 3.00x the mean",
        "Dashed: 100 MiB a rank were predicted; peaks differ from that by +0.0% to +10.0%.",
        "4 * 1 * 1 * 1 = 4 ranks",
        "4 phases in 2.50 s, warned of latency flat (phase 2).",
        "2 configure communication, 0.50 s",
        "latency flat ! warn all-gather 1.7, all-to-all 1.6 ms (target 1) & <slow>",
        "contiguous experts",
        "launch/infer.py --model 'tiny & <b>' --metrics out",
        "torch 2.13.0",
    ):
        assert part in text, part
    # Means of a decode pass: of 4 * 38 passes, experts took 2 + 2 + 2 + 4 s.
    assert re.search(r"experts 50\.0 ms 65\.8 ms", text)


def test_the_summary_fits_a_terminal_and_says_the_same(tmp_path, capsys):
    folder = _written(tmp_path)
    code, out, err = _report(folder, capsys)
    assert (code, err) == (0, "")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    lines = out.splitlines()
    assert lines[-1] == f"wrote {folder / 'report.html'}"
    assert all(len(line) <= 100 for line in lines[:-1])
    assert lines[0] == "tiny & <b> on 4 CPU ranks"
    metrics = read_metrics(folder)
    verdicts = judge(metrics)
    assert out.startswith(summary_text(metrics, verdicts))
    assert [line.split("  ")[0].strip() for line in lines if re.match(r" *(missed|met|-)  ", line)]
    for verdict in verdicts:
        (line,) = (line for line in lines if f"  {verdict.name}  " in line)
        assert verdict.measured in line
        assert verdict.target in line


def test_a_name_cannot_steer_the_terminal(tmp_path):
    folder = _written(tmp_path, lambda files: files["run.json"].update(model="a\x1b]0;b\x07\n"))
    text = summary_text(read_metrics(folder), [])
    assert text.splitlines()[0] == "a?]0;b?? on 4 CPU ranks"


def test_a_run_without_samples_windows_or_passes_is_still_reported(tmp_path, capsys):
    def change(files):
        files["samples.jsonl"] = files["balance.jsonl"] = []
        for line in files["experts.jsonl"]:
            line["tokens_per_expert"] = [0] * 8
        for rank in files["metrics.jsonl"]:
            rank |= {
                "num_prompts": 0,
                "new_tokens": 0,
                "expert_rows": 0,
                "run_s": 0.0,
                "num_steps": 0,
                "collectives": {},
                "num_passes": {"prefill": 0, "decode": 0},
                "pass_s": {"prefill": None, "decode": None},
                "first_token_s": None,
            }

    folder = _written(tmp_path, change)
    code, out, _ = _report(folder, capsys)
    assert code == 0
    assert "no pass was recorded" in out
    text = " ".join(_Elements((folder / "report.html").read_text()).text)
    for part in ("No sample was recorded", "No collective took place", "No pass was recorded"):
        assert part in text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (few_digits(0.5), "0.50"),
        (few_digits(99.94), "99.9"),
        (few_digits(12345.6), "12,346"),
        (size(512), "512 B"),
        (size(1536), "1.50 KiB"),
        (size(80 * 2**30), "80.0 GiB"),
        (span(89.4), "89.4 s"),
        (span(150), "2 min"),
        (span(3 * 3600 + 300), "3 h 05 min"),
        (time_of(1.5), "1.50 s"),
        (time_of(0.0123), "12.3 ms"),
        (time_of(2.5e-7), "0.25 us"),
        (time_of(0), "0 s"),
        (times(1.234), "1.23x"),
        (times(40), "40x"),
        (printable("a\tb\u200bc"), "a?b?c"),
    ],
)
def test_figures_as_people_read_them(shown, expected):
    assert shown == expected


def test_the_fixture_is_what_json_can_hold():
    assert json.loads(json.dumps(small_metrics())) == small_metrics()
