"""The report of a job as one HTML file that needs nothing else: no script, no font, no network.

What it shows is found in findings.py and verdicts.py; the charts are drawn in charts.py.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape
from importlib import resources

from ds_moe_ep import __version__
from ds_moe_ep.monitor import charts
from ds_moe_ep.monitor.findings import (
    hot_experts,
    kind_latencies,
    pass_parts,
    replays_told,
    slow_rank,
)
from ds_moe_ep.monitor.metrics_folder import Metrics
from ds_moe_ep.monitor.metrics_format import PARTS, PASS_KINDS, Quantiles, Run
from ds_moe_ep.monitor.units import few_digits, printable, size, span, time_of, times
from ds_moe_ep.monitor.verdicts import COLLECTIVE_NAMES, TARGETS, Verdict

__all__ = ["bring_up_told", "key_figures", "page", "title"]

_MARKS = {"met": "&#10003; met", "missed": "&#10007; missed", "open": "&#8211; not judged"}
_CHECK_MARKS = {"pass": "&#10003; pass", "warn": "! warn", "fail": "&#10007; fail"}
_TOKENS = ("new_tokens", "prompt_tokens")
_NUMBER = ' class="number"'
_MOST_HOT = 10
# Nothing is loaded, whatever stands in the files; images are those within the page.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def title(metrics: Metrics) -> str:
    """Returns what was run, on what."""
    run = metrics.run
    name = printable(run.model.rstrip("/").rpartition("/")[2])
    if run.on_cpu:
        return f"{name} on {run.world_size} CPU rank{'' if run.world_size == 1 else 's'}"
    return f"{name} on {run.world_size} x {printable(run.device)}"


def key_figures(metrics: Metrics) -> dict[str, str]:
    """Returns the figures that everybody asks for first, by name."""
    ranks, generates = metrics.ranks, metrics.run.task == "generate"
    run_s = max(rank.run_s for rank in ranks)
    new, read = (sum(getattr(rank, name) for rank in ranks) for name in _TOKENS)
    tokens, what = (new, "generated") if generates else (read, "scored")
    first = [rank.first_token_s.p50 for rank in ranks if rank.first_token_s and generates]
    return {
        "tokens/s": few_digits(tokens / run_s) if run_s else "0",
        f"tokens {what}": f"{tokens:,}",
        "prompts": f"{sum(rank.num_prompts for rank in ranks):,}",
        "run": span(run_s),
        "loading": span(max(rank.load_s for rank in ranks)),
        **({"first token, p50": time_of(max(first))} if first else {}),
    }


def page(metrics: Metrics, verdicts: Sequence[Verdict]) -> str:
    """Returns the report as HTML."""
    style = resources.files("ds_moe_ep.monitor").joinpath("report.css").read_text(encoding="utf-8")
    sections = (
        _targets(verdicts),
        _time(metrics),
        _balance(metrics),
        _communication(metrics),
        _memory(metrics),
        _utilisation(metrics),
        _ranks(metrics),
        _bring_up(metrics),
        _run(metrics),
    )
    name = escape(title(metrics))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{name}</title>
<style>
{style}</style>
</head>
<body>
<main>
{_header(metrics, name)}
{"".join(sections)}
<footer>ds_moe_ep {escape(__version__)}</footer>
</main>
</body>
</html>
"""


def _header(metrics: Metrics, name: str) -> str:
    run, plan = metrics.run, metrics.run.plan
    started = datetime.fromisoformat(run.started_at).strftime("%Y-%m-%d %H:%M %Z")
    hosts = len(set(run.hosts))
    told = (
        f"{started}. EP{plan.ep_size} TP{plan.tp_size} PP{plan.pp_size} DP{plan.dp_size} on "
        f"{hosts} host{'' if hosts == 1 else 's'}, {run.dtype}, batches {run.batch_mode}."
    )
    figures = "".join(
        f"<div><dt>{escape(what)}</dt><dd>{escape(figure)}</dd></div>"
        for what, figure in key_figures(metrics).items()
    )
    return (
        f'<header><h1>{name}</h1><p>{escape(told)}</p><dl class="figures">{figures}</dl></header>'
    )


def _placement(run: Run) -> str:
    if run.slots_per_rank is None:
        return "contiguous experts"
    return f"{run.slots_per_rank} slots of a layer on each rank, filled by --placement"


def _section(heading: str, text: str, *content: str) -> str:
    paragraph = f"<p>{escape(text)}</p>" if text else ""
    return f"<section><h2>{escape(heading)}</h2>{paragraph}{''.join(content)}</section>\n"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]], num_words: int = 1) -> str:
    """Returns a table that scrolls in its box; all but the first columns are numbers."""

    def cells(tag: str, values: Sequence[object]) -> str:
        return "".join(
            f"<{tag}{_NUMBER if index >= num_words else ''}>{escape(str(value))}</{tag}>"
            for index, value in enumerate(values)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    # Whoever has no mouse scrolls with the keys, once the box has the focus.
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells("th", titles)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    """Returns a table of names and texts."""
    rows = (f"<tr><td>{escape(name)}</td><td>{escape(text)}</td></tr>" for name, text in facts)
    return f'<table class="facts"><tbody>{"".join(rows)}</tbody></table>'


def _targets(verdicts: Sequence[Verdict]) -> str:
    judged = [verdict for verdict in verdicts if verdict.state != "open"]
    met = sum(verdict.state == "met" for verdict in judged)
    rows = "".join(
        f'<tr><td class="name">{escape(verdict.name)}</td>'
        f'<td class="measured {"" if verdict.measured else "open"}">'
        f"{escape(verdict.measured or 'not measured')}</td>"
        f'<td class="target">{escape(verdict.target)}</td>'
        f'<td class="state {verdict.state}">{_MARKS[verdict.state]}</td>'
        f'<td class="reason">{escape(verdict.reason)}</td></tr>'
        for verdict in verdicts
    )
    titles = "".join(
        f"<th>{name}</th>" for name in ("quantity", "measured", "target", "verdict", "why")
    )
    return _section(
        "Targets",
        f"{met} of {len(judged)} that this run can show are met.",
        f'<table class="verdicts"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>',
    )


def _time(metrics: Metrics) -> str:
    kinds = [kind for kind in PASS_KINDS if pass_parts(metrics, kind)]
    if not kinds:
        return _section("Where time goes", "No pass was recorded.")
    slow = slow_rank(metrics)
    told = f"Slowest: {slow}." if slow else "No rank is waited for notably longer than others."
    columns = [pass_parts(metrics, kind) for kind in kinds]
    rows = [[part, *(time_of(column[part]) for column in columns)] for part in PARTS]
    rows.append(["whole pass", *(time_of(sum(column.values())) for column in columns)])
    for name in ("p50", "p95", "max"):
        values = [_quantile(metrics, kind, name) for kind in kinds]
        rows.append([f"{name}, slowest rank", *values])
    return _section(
        "Where time goes",
        f"{told} Dispatch and combine include waiting for other ranks.",
        charts.step_bars(metrics),
        _table(["mean of a pass", *kinds], rows),
    )


def _quantile(metrics: Metrics, kind: str, name: str) -> str:
    found: list[Quantiles | None] = [getattr(rank.pass_s, kind) for rank in metrics.ranks]
    values = [getattr(each, name) for each in found if each]
    return time_of(max(values)) if values else ""


def _balance(metrics: Metrics) -> str:
    hot = hot_experts(metrics)[:_MOST_HOT]
    rows = [(each.layer, each.expert, f"{each.tokens:,}", times(each.factor)) for each in hot]
    return _section(
        "Balance",
        "Rows that experts computed on each rank, and tokens of each expert: blue is less than the "
        "mean of its layer, orange more.",
        charts.rank_load_bars(metrics),
        charts.expert_heat_map(metrics),
        "<details><summary>The hottest expert of the most skewed layers</summary>",
        _table(("layer", "expert", "tokens", "by the mean"), rows, num_words=0),
        "</details>",
    )


def _communication(metrics: Metrics) -> str:
    latencies, replayed = kind_latencies(metrics), replays_told(metrics)
    if not latencies:
        return _section("Communication", f"{replayed or 'No collective took place'}.")
    rows = [
        (
            COLLECTIVE_NAMES[each.kind],
            f"{each.count:,}",
            size(each.sent_bytes / each.count),
            *map(time_of, (each.p50_s, each.p95_s, each.max_s, each.least_p50_s)),
            each.least_rank,
        )
        for each in latencies
    ]
    titles = ("collective", "count", "sent, each", "p50", "p95", "max", "least p50", "of rank")
    return _section(
        "Communication",
        "Waiting for slower ranks is included; p50 and p95 are those of the rank where they are "
        "highest. The least p50 is of the rank that waits least: the most that links can take."
        + (f" {replayed}." if replayed else ""),
        charts.latency_histograms(metrics),
        _table(titles, rows),
    )


def _memory(metrics: Metrics) -> str:
    predicted = metrics.run.predicted_memory_bytes
    if predicted is None:
        return _section("Memory", "No prediction was recorded.", charts.memory_bars(metrics))
    differences = [rank.peak_memory_bytes / predicted - 1 for rank in metrics.ranks]
    told = (
        f"Dashed: {size(predicted)} a rank were predicted; peaks differ from that by "
        f"{min(differences):+.1%} to {max(differences):+.1%}."
    )
    return _section("Memory", told, charts.memory_bars(metrics))


def _utilisation(metrics: Metrics) -> str:
    what = "CPU time of each process by wall time" if metrics.run.on_cpu else "Of the GPUs"
    told = f"{what}: the mean of all ranks, and from the lowest to the highest. Dashed: target"
    picture = charts.utilisation_line(metrics)
    return _section(
        "Utilisation over time",
        f"{told} {TARGETS.utilisation:.0%}." if picture else "No sample was recorded.",
        picture,
    )


def _ranks(metrics: Metrics) -> str:
    rows = [
        (
            rank.rank,
            rank.host,
            f"{rank.num_prompts:,}",
            f"{rank.prompt_tokens:,}",
            f"{rank.new_tokens:,}",
            f"{rank.expert_rows:,}",
            f"{rank.utilisation:.0%}",
            size(rank.peak_memory_bytes),
            span(rank.comm_s),
            size(rank.comm_bytes),
        )
        for rank in metrics.ranks
    ]
    titles = "rank,host,prompts,prompt tokens,new tokens,expert rows,utilisation,peak memory"
    titles += ",collectives,sent"
    return _section("Ranks", "", _table(titles.split(","), rows, num_words=2))


def _bring_up(metrics: Metrics) -> str:
    rows = []
    for phase in metrics.bring_up:
        head = f"{phase.phase} {phase.name}"
        rows.append(
            f'<tr class="phase"><th colspan="3" scope="rowgroup">{escape(head)}, '
            f"{escape(span(phase.seconds))}</th></tr>"
        )
        rows += [
            f'<tr><td class="name">{escape(check.name)}</td>'
            f'<td class="state {check.verdict}">{_CHECK_MARKS[check.verdict]}</td>'
            f'<td class="reason">{escape(check.reason)}</td></tr>'
            for check in phase.checks
        ]
    return _section(
        "Bring-up",
        f"What was checked before the first batch: {bring_up_told(metrics)}.",
        f'<table class="verdicts checks"><tbody>{"".join(rows)}</tbody></table>',
    )


def bring_up_told(metrics: Metrics) -> str:
    """Returns how long the bring-up took, and which checks did not pass."""
    seconds = span(sum(phase.seconds for phase in metrics.bring_up))
    warned = [
        f"{check.name} (phase {phase.phase})"
        for phase in metrics.bring_up
        for check in phase.checks
        if check.verdict != "pass"
    ]
    told = f"warned of {', '.join(warned)}" if warned else "all checks passed"
    return f"{len(metrics.bring_up)} phases in {seconds}, {told}"


def _run(metrics: Metrics) -> str:
    run, plan = metrics.run, metrics.run.plan
    ranks_of_plan = f"{plan.ep_size} * {plan.tp_size} * {plan.pp_size} * {plan.dp_size}"
    dense = f"{plan.dense_dp_size} * {plan.tp_size} * {plan.pp_size}"
    chosen = metrics.ranks[0].dispatcher
    layers = f"{len(run.moe_layers)} with {run.num_experts} experts, {run.top_k} for each token"
    rows = [
        ("model", f"{run.model} ({run.model_type})"),
        ("MoE layers", layers),
        ("experts: EP * TP * PP * DP", f"{ranks_of_plan} = {plan.world_size} ranks"),
        ("dense: DP * TP * PP", f"{dense} = {plan.world_size} ranks"),
        ("task", run.task),
        ("device", run.device),
        ("placement", _placement(run)),
        ("dispatcher", chosen if run.dispatcher in chosen else f"{run.dispatcher}: {chosen}"),
        *run.versions.items(),
    ]
    return _section(
        "The run",
        "",
        _facts(rows),
        f"<pre>{escape(shlex.join(run.command))}</pre>",
    )
