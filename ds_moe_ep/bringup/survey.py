"""Asks all hosts of a job at once, over ssh, for what they have, before any rank is started.

Each is asked as DeepSpeed's launcher would start ranks there: by the ``ssh`` on the PATH, with the
same configuration, ``PDSH_SSH_ARGS_APPEND`` and ``PYTHONPATH``; this machine answers the same
question. What the answers mean is judged in compare.py.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ds_moe_ep.bringup import host_facts
from ds_moe_ep.bringup.compare import Wanted, host_checks, problems, software
from ds_moe_ep.bringup.report import FAIL, Check, PhaseReport
from ds_moe_ep.errors import BringUpError
from ds_moe_ep.hostfile import Cluster, Host

__all__ = ["THIS_MACHINE", "Survey", "survey"]

THIS_MACHINE = "this machine"
"""The check of what the machine that starts the job lacks; no host can have this name."""

# What DeepSpeed's launcher and pdsh read as one host. A name that begins with a dash would be an
# option to ssh; other characters mean something to a shell or to pdsh.
_HOST_NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*@)?[A-Za-z0-9_][A-Za-z0-9._:-]*")
_CONNECT_S = 10
# A user's own options go before these: ssh takes the first of each.
_SSH_OPTIONS = (
    f"-oConnectTimeout={_CONNECT_S}",
    "-oConnectionAttempts=1",
    "-oServerAliveInterval=5",
    "-oServerAliveCountMax=3",
)
_MOST_AT_ONCE = 64
# A disk that is slower than this when a file is read whole counts as hung.
_SLOWEST_BYTES_PER_S = 50e6
_SHARED_MEMORY = "/dev/shm"
_NEEDED_MIB = {_SHARED_MEMORY: 32}  # for rows between ranks of a host
_NEEDED_TEMPORARY_MIB = 256


@dataclass(frozen=True)
class Survey:
    """What hosts are asked.

    Attributes:
        model: The model directory, an absolute path.
        whole_files: Whether model files are compared byte by byte, or by size and header.
        on_gpus: Whether ranks run on GPUs; None where the hosts' GPUs decide.
        timeout_s: How long a host may take to answer, the time for whole files not counted.
    """

    model: Path
    whole_files: bool = True
    on_gpus: bool | None = None
    timeout_s: float = 60.0


def survey(cluster: Cluster, asked: Survey) -> PhaseReport:
    """Asks all hosts, in parallel, and compares them with this machine.

    Args:
        cluster: The hosts and their slots.
        asked: What is asked.

    Returns:
        The first part of phase 1, which names every host that cannot take part, and this machine
        if it cannot start ranks there.

    Raises:
        BringUpError: This machine, which the others are compared with, does not tell what it has.
    """
    start_s = time.monotonic()
    needed = {tempfile.gettempdir(): _NEEDED_TEMPORARY_MIB, **_NEEDED_MIB}
    request: dict[str, Any] = {
        "folder": os.getcwd(),
        "model": str(asked.model),
        "whole_files": asked.whole_files,
        "places": list(needed),
    }
    names = [] if cluster.is_local else [host.name for host in cluster.hosts]
    with ThreadPoolExecutor(_MOST_AT_ONCE) as pool:
        answers = {name: pool.submit(_ask, name, request, _patience_s(asked)) for name in names}
        own = _own_answer(request, _patience_s(asked))
        found = {name: answer.result() for name, answer in answers.items()} or {"localhost": own}
    wanted = Wanted(
        facts=own,
        python=sys.executable,
        folder=request["folder"],
        model=str(asked.model),
        free_bytes={place: mib << 20 for place, mib in needed.items()},
    )
    told = _judge(cluster, found, wanted, asked.on_gpus)
    num_files = len(own["model_files"] or {})
    how = "whole" if asked.whole_files else "by size and header"
    good = f"{software(own)}, same code, {num_files} model files compared {how}"
    checks = host_checks(told, good)
    if not cluster.is_local and shutil.which("pdsh") is None:
        reason = "pdsh is missing: apt-get install -y pdsh"
        checks.append(Check(THIS_MACHINE, FAIL, reason))
    return PhaseReport(1, tuple(checks), time.monotonic() - start_s, part="hosts")


def _judge(
    cluster: Cluster,
    found: Mapping[str, Mapping[str, Any] | str],
    wanted: Wanted,
    on_gpus: bool | None,
) -> dict[str, list[str]]:
    """Returns what is wrong with each host, by name."""
    answers = {name: answer for name, answer in found.items() if not isinstance(answer, str)}
    if on_gpus is None:  # as DeepSpeed decides: there are none, so ranks run on CPUs
        on_gpus = any(facts["num_gpus"] for facts in [wanted.facts, *answers.values()])
    told = {}
    for host in cluster.hosts:
        answer = found[host.name]
        if isinstance(answer, str):
            told[host.name] = [answer]
            continue
        needs = replace(wanted, num_gpus=_gpus_needed(host) if on_gpus else 0)
        told[host.name] = problems(host.name, answer, needs)
    return told


def _gpus_needed(host: Host) -> int:
    return max(host.slots) + 1


def _patience_s(asked: Survey) -> float:
    if not asked.whole_files or not asked.model.is_dir():
        return asked.timeout_s
    num_bytes = sum(path.stat().st_size for path in asked.model.iterdir() if path.is_file())
    return asked.timeout_s + num_bytes / _SLOWEST_BYTES_PER_S


def _question(request: Mapping[str, Any]) -> list[str]:
    """Returns the command that reads the facts, with modules found as DeepSpeed has ranks do it."""
    paths = [request["folder"], *filter(None, [os.environ.get("PYTHONPATH")])]
    search = f"PYTHONPATH={os.pathsep.join(paths)}"
    return ["env", search, sys.executable, "-", json.dumps(request)]


def _run(argv: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Runs a command that runs what reads the facts."""
    return subprocess.run(
        argv,
        input=_source(),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout_s,
        check=False,
    )


def _source() -> str:
    return Path(host_facts.__file__).read_text(encoding="utf-8")


def _answer(stdout: str) -> dict[str, Any] | None:
    """Returns the facts among what a host printed; None if there are none."""
    for line in stdout.splitlines():
        if line.startswith(host_facts.MARK):
            facts: dict[str, Any] = json.loads(line.removeprefix(host_facts.MARK))
            return facts
    return None


def _own_answer(request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    try:
        ended = _run(_question(request), timeout_s)
    except subprocess.TimeoutExpired:
        raise BringUpError(
            f"this machine did not tell within {timeout_s:.0f} s what it has: does its driver "
            f"(nvidia-smi) answer, and the folder {request['model']}?"
        ) from None
    if (facts := _answer(ended.stdout)) is None:
        said = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise BringUpError(f"this machine cannot tell what it has: {said}")
    return facts


def _ask(name: str, request: Mapping[str, Any], timeout_s: float) -> dict[str, Any] | str:
    """Returns the facts of a host, or why there are none."""
    if not _HOST_NAME.fullmatch(name):
        return f"{name!r} is no name of a host: use letters, digits and '.-_:', and user@host"
    extra = shlex.split(os.environ.get("PDSH_SSH_ARGS_APPEND", ""))
    options = ["-x", "-oBatchMode=yes", *extra, *_SSH_OPTIONS]
    argv = ["ssh", *options, "--", name, shlex.join(_question(request))]
    try:
        ended = _run(argv, timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:.0f} s: try ssh {name} hostname"
    except OSError as error:
        return f"ssh cannot be started here: {error}. Install it: apt-get install -y openssh-client"
    return _answer(ended.stdout) or _why_no_answer(name, ended.returncode, ended.stderr)


def _why_no_answer(name: str, code: int, stderr: str) -> str:
    said = (stderr.strip().splitlines() or [f"exit code {code}"])[-1]
    if code == 255:  # ssh's own
        return (
            f"not reachable by ssh ({said}): ssh {name} hostname must work without a password, "
            f"see ssh-copy-id {name}"
        )
    if code in (126, 127):
        return f"no interpreter at {sys.executable} ({said}): put the same environment there"
    return f"cannot tell what it has ({said})"
