"""Compares the facts of hosts: what a host lacks or has otherwise, and the command that helps.

How the facts are gathered is not its business: by ssh before a job, by its ranks within one.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ds_moe_ep.bringup.host_facts import PACKAGES
from ds_moe_ep.bringup.report import FAIL, PASS, Check
from ds_moe_ep.errors import some

__all__ = ["Wanted", "host_checks", "problems", "software"]

Facts = Mapping[str, Any]


@dataclass(frozen=True)
class Wanted:
    """What a host is compared with.

    Attributes:
        facts: Those of the host that the others are to be like.
        python: The interpreter, at the same path on all hosts.
        folder: Where the job is started.
        model: The model directory.
        num_gpus: GPUs that the host needs; 0 where ranks run on CPUs.
        free_bytes: Free disk space that it needs, by folder.
    """

    facts: Facts
    python: str
    folder: str
    model: str
    num_gpus: int = 0
    free_bytes: Mapping[str, int] | None = None


def problems(host: str, facts: Facts, wanted: Wanted) -> list[str]:
    """Returns what is wrong with a host, each with what to do about it; empty if nothing is."""
    return [
        *_software_problems(host, facts, wanted),
        *_model_problems(host, facts, wanted),
        *_hardware_problems(host, facts, wanted),
    ]


def _software_problems(host: str, facts: Facts, wanted: Wanted) -> list[str]:
    found = []
    if facts["python"] != wanted.facts["python"]:
        found.append(
            f"Python {facts['python']}, not {wanted.facts['python']}: put the same interpreter at "
            f"{wanted.python}"
        )
    for name in PACKAGES:
        here, there = wanted.facts["packages"][name], facts["packages"][name]
        if here == there:
            continue
        if here is None:
            uninstall = shlex.join([wanted.python, "-m", "pip", "uninstall", "-y", name])
            what = f"{name} {there} is installed, and here it is not"
            found.append(f"{what}: {_on(host, uninstall)}")
            continue
        what = f"{name} is missing" if there is None else f"{name} {there}, not {here}"
        install = shlex.join([wanted.python, "-m", "pip", "install", f"{name}=={here}"])
        if name == "ds_moe_ep":
            install = shlex.join([wanted.python, "-m", "pip", "install", "-e", wanted.folder])
        found.append(f"{what}: {_on(host, install)}")
    copy_code = _copy(wanted.folder, f"{host}:{wanted.folder}")
    if not facts["has_folder"]:
        found.append(f"no folder {wanted.folder}: {copy_code}")
    elif facts["code_sha256"] != wanted.facts["code_sha256"]:
        what = "no ds_moe_ep" if facts["code_sha256"] is None else "other code of ds_moe_ep"
        found.append(f"{what}: {copy_code}")
    return found


def _model_problems(host: str, facts: Facts, wanted: Wanted) -> list[str]:
    way_out = _copy_model(wanted.model, f"{host}:{wanted.model}")
    if facts["model_files"] is None:
        return [f"no model folder {wanted.model}: {way_out}"]
    here, there = wanted.facts["model_files"] or {}, facts["model_files"]
    kinds = {
        "missing": sorted(here.keys() - there.keys()),
        "not here": sorted(there.keys() - here.keys()),
        "different": sorted(
            n for n in here.keys() & there.keys() if list(here[n]) != list(there[n])
        ),
    }
    told = [f"{len(names)} {kind} ({some(names)})" for kind, names in kinds.items() if names]
    if not told:
        return []
    if kinds["not here"]:  # and this may be the copy that lacks something
        back = _copy_model(f"{host}:{wanted.model}", wanted.model)
        way_out = f"if all of them belong to the model, {back}; else remove them there"
    return [f"model files {', '.join(told)}: {way_out}"]


def _hardware_problems(host: str, facts: Facts, wanted: Wanted) -> list[str]:
    found = []
    if facts["num_gpus"] < wanted.num_gpus:
        there = facts["num_gpus"]
        way_out = f"write '{host} slots={there}' in the hostfile" if there else "exclude it"
        found.append(f"{there} GPUs for {wanted.num_gpus} slots: {way_out}")
    for place, needed in (wanted.free_bytes or {}).items():
        free = facts["free_bytes"].get(place)
        if free is not None and free < needed:
            found.append(
                f"{free / 2**20:,.0f} MiB free in {place}, {needed / 2**20:,.0f} are needed: make "
                "room there"
            )
    return found


def host_checks(found: Mapping[str, Sequence[str]], good: str) -> list[Check]:
    """Returns a check that sums up the hosts in order, and one for each that is not.

    Args:
        found: What is wrong with each host, by name.
        good: What all hosts in order have in common.
    """
    bad = {host: told for host, told in found.items() if told}
    num_good = len(found) - len(bad)
    checks = [Check(host, FAIL, "; ".join(told)) for host, told in bad.items()]
    if num_good:
        checks.insert(0, Check("hosts", PASS, f"{num_good} of {len(found)}: {good}"))
    return checks


def software(facts: Facts) -> str:
    """Returns the versions of a host, for people."""
    packages = [f"{name} {version}" for name, version in facts["packages"].items() if version]
    return ", ".join([f"Python {facts['python']}", *packages])


def _on(host: str, command: str) -> str:
    return shlex.join(["ssh", host, command])


def _copy(source: str, target: str, options: str = "-a") -> str:
    return shlex.join(["rsync", options, f"{source.rstrip('/')}/", f"{target.rstrip('/')}/"])


def _copy_model(source: str, target: str) -> str:
    return _copy(source, target, "-aL")  # in the hub's cache all files are links
