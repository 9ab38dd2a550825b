"""`ds-moe-ep preflight`: the survey of all hosts, then the four phases on all ranks.

Ranks are started as a job's are, by DeepSpeed's launcher; what they do is launch/infer.py's.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ds_moe_ep.bringup.report import PHASES, Check, write_jsonl
from ds_moe_ep.bringup.survey import THIS_MACHINE, Survey, survey
from ds_moe_ep.errors import BringUpError, ConfigError
from ds_moe_ep.hostfile import Cluster
from ds_moe_ep.local_machine import free_port

__all__ = ["SURVEY_JSONL", "Launch", "ask_hosts", "launch_command", "preflight"]

SURVEY_JSONL = "survey.jsonl"

_INFER = Path(__file__).resolve().parents[2] / "launch" / "infer.py"
_REFUSED = 2
_INTERRUPTED = 130
_END_S = 30.0
# DeepSpeed hands words to a shell on every host without quoting them; these need none.
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_@+=:,./-]+")


@dataclass(frozen=True)
class Launch:
    """How the ranks are started.

    Attributes:
        arguments: Those of launch/infer.py.
        hostfile: The file that the hosts were read from, if they were.
        is_filtered: Whether some of its slots were left out.
        master_addr: Where ranks meet; None leaves it to DeepSpeed.
        master_port: And the port; None is one that is free on this machine.
    """

    arguments: tuple[str, ...]
    hostfile: Path | None = None
    is_filtered: bool = False
    master_addr: str | None = None
    master_port: int | None = None


def preflight(
    cluster: Cluster,
    asked: Survey,
    launch: Launch,
    *,
    metrics: Path | None,
    tell: Callable[[str], None],
) -> int:
    """Surveys the hosts and, if all can take part, has the ranks go through the phases.

    Args:
        cluster: The hosts and their slots.
        asked: What hosts are asked.
        launch: How ranks are started.
        metrics: Folder for survey.jsonl; the ranks write bringup.jsonl there.
        tell: Gets what there is to show.

    Returns:
        The exit code: 0 if all phases pass or warn, 2 if one fails, 1 if anything else happens.

    Raises:
        BringUpError: Some hosts cannot take part; it names all of them.
        ConfigError: There is nothing to start, or no way to start it.
    """
    if not _INFER.exists():
        raise ConfigError(f"{_INFER} is not there: run preflight from a checkout of ds_moe_ep.")
    command = launch_command(cluster, launch)
    _refuse_unquotable(cluster, command)
    ask_hosts(cluster, asked, metrics=metrics, tell=tell)
    code = _run(command)
    return code if code in (0, _REFUSED, _INTERRUPTED) else 1


def ask_hosts(
    cluster: Cluster,
    asked: Survey,
    *,
    metrics: Path | None,
    tell: Callable[[str], None],
    is_brief: bool = False,
) -> None:
    """Surveys the hosts, and starts nothing.

    Args:
        cluster: As for `preflight`, and so are the others.
        asked: What hosts are asked.
        metrics: Folder for survey.jsonl.
        tell: Gets what there is to show.
        is_brief: Whether that is one line where all is well.

    Raises:
        BringUpError: Some hosts cannot take part; it names all of them.
    """
    if asked.whole_files:
        tell("reading all model files on every host; --quick compares sizes and headers only")
    report = survey(cluster, asked)
    if is_brief and not report.failed:
        tell(f"hosts: {report.checks[0].reason} ({report.seconds:.2f} s)")
    else:
        tell(report.to_text())
    if metrics is not None:
        write_jsonl(metrics / SURVEY_JSONL, [report])
    if report.failed:
        raise BringUpError(
            f"stopped at phase 1 of {len(PHASES)}, {report.name}: "
            f"{_who_failed(report.failed, len(cluster.hosts))}"
        )


def _who_failed(failed: Sequence[Check], num_hosts: int) -> str:
    """Returns which hosts cannot take part, and behind them what this machine lacks."""
    hosts = [f"{check.name}: {check.reason}" for check in failed if check.name != THIS_MACHINE]
    told = [f"{check.name}: {check.reason}" for check in failed if check.name == THIS_MACHINE]
    if hosts:
        told.insert(0, f"{len(hosts)} of {num_hosts} cannot take part: {' | '.join(hosts)}")
    return " | ".join(told)


def launch_command(cluster: Cluster, launch: Launch) -> list[str]:
    """Returns the command that starts the ranks, as run.sh of `ds-moe-ep config` does."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    address = launch.master_addr
    if cluster.is_local:
        used = cluster.include_filter
        which = ["-i", used] if used else ["--num_gpus", str(cluster.num_gpus)]
        command += ["--hostfile", os.devnull, *which]
        address = address or "127.0.0.1"
    else:
        command += ["--hostfile", str(launch.hostfile)]
        command += ["--launcher", "pdsh"]
        command += ["--force_multi"] if len(cluster.hosts) == 1 else []
        command += ["--include", cluster.spell_out()] if launch.is_filtered else []
    command += ["--master_addr", address] if address else []
    command += ["--master_port", str(launch.master_port or free_port())]
    return [*command, str(_INFER), *launch.arguments]


def _refuse_unquotable(cluster: Cluster, command: list[str]) -> None:
    """Refuses words that would not reach the hosts as they are.

    Host names are left to the survey, which names all that are none.
    """
    if cluster.is_local:
        return
    words = [os.getcwd(), sys.executable, *command[command.index(str(_INFER)) :]]
    if bad := [word for word in words if not _PLAIN_WORD.fullmatch(word)]:
        raise ConfigError(
            f"{bad[0]!r} would not reach the other hosts unchanged: DeepSpeed's pdsh launcher does "
            "not quote. Use names of letters, digits and _@+=:,./- here."
        )


def _run(command: list[str]) -> int:
    """Runs the launcher until it ends, and ends it if this process is told to stop."""
    running = subprocess.Popen(command, start_new_session=True)
    try:
        return running.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGTERM)
            try:
                running.wait(_END_S)
            except subprocess.TimeoutExpired:
                os.killpg(running.pid, signal.SIGKILL)
