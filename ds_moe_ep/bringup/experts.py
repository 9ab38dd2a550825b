"""Phase 1 within the job: every rank tells what its host has, and which experts it holds.

So hosts that differ are named also where nobody has asked them before the ranks were started.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ds_moe_ep.adapter.replace import AdaptReport
from ds_moe_ep.bringup.compare import Wanted, host_checks, problems, software
from ds_moe_ep.bringup.host_facts import free_bytes, read_facts
from ds_moe_ep.bringup.report import FAIL, PASS, WARN, Check
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.dist.node_groups import first_ranks
from ds_moe_ep.errors import some
from ds_moe_ep.placement import SlotPlacement

__all__ = [
    "check_experts",
    "check_hosts",
    "check_room_for_output",
    "judge_experts",
    "judge_hosts",
    "judge_placed",
]

# A token in the journal and in the output, as digits, a comma and its part of the text.
_OUTPUT_BYTES_PER_TOKEN = 32

Held = Mapping[str, tuple[Sequence[int], int]]
"""By MoE layer, the experts a rank holds, and how many there are."""


def check_hosts(job: Job, model: Path) -> list[Check]:
    """Compares versions, code and model files of all ranks; all ranks call it.

    Files are read on one rank of each host, those of the model by size and header.
    """
    is_first = job.info.rank in first_ranks(job.nodes)
    folder = os.path.abspath(model)
    facts = read_facts(model=folder if is_first else None, code=is_first)
    return judge_hosts(job.all_gather(facts), job.hosts, job.nodes, folder)


def judge_hosts(
    facts: Sequence[dict[str, Any]], hosts: Sequence[str], nodes: Sequence[int], model: str
) -> list[Check]:
    """Compares the facts of all ranks with those of rank 0.

    Args:
        facts: By rank; of its files only on the first rank of each node.
        hosts: Name of every rank's host.
        nodes: Node of every rank.
        model: The model directory.
    """
    wanted = Wanted(facts[0], sys.executable, os.getcwd(), model)
    of_files = {name: facts[0][name] for name in ("model_files", "code_sha256")}
    found: dict[str, dict[str, None]] = defaultdict(dict)  # a host's ranks say the same: once
    firsts = set(first_ranks(nodes))
    for rank, (each, host) in enumerate(zip(facts, hosts, strict=True)):
        own = each if rank in firsts else {**each, **of_files}
        found[host] |= dict.fromkeys(problems(host, own, wanted))
    num_files = len(facts[0]["model_files"] or {})
    good = f"{software(facts[0])}, same code, {num_files} model files (size and header)"
    return host_checks({host: list(told) for host, told in found.items()}, good)


def check_experts(job: Job, report: AdaptReport, placement: SlotPlacement | None = None) -> Check:
    """Compares the experts that all ranks hold with those of the model; all ranks call it.

    Args:
        job: The job.
        report: What this rank holds.
        placement: Where experts are to be, if they are not contiguous.
    """
    own = {layer.name: (layer.local_experts, layer.num_experts) for layer in report.layers}
    held = job.all_gather(own)
    if placement is not None:
        return judge_placed(held, placement)
    return judge_experts(held, report.ep_size)


def judge_experts(held: Sequence[Held], ep_size: int) -> Check:
    """Finds out whether each expert group holds every expert of every layer exactly once.

    Args:
        held: What each rank holds.
        ep_size: Ranks of an expert group; groups are of consecutive ranks.
    """
    wrong = [
        problem
        for first in range(0, len(held), ep_size)
        for problem in _wrong_in_group(held[first : first + ep_size], first)
    ]
    if wrong:
        return Check("experts", FAIL, f"not each expert once: {some(wrong)}")
    num_instances = sum(num_experts for _, num_experts in held[0].values())
    local = [len(own) for own, _ in held[0].values()]
    copies = len(held) // ep_size
    return Check(
        "experts",
        PASS,
        f"{len(held)} ranks hold {num_instances:,} experts of {len(held[0])} layers, each "
        f"{'once' if copies == 1 else f'once in each of {copies} groups'}: "
        f"{sum(local):,} a rank, {local[0]} of a layer",
    )


def judge_placed(held: Sequence[Held], placement: SlotPlacement) -> Check:
    """Finds out whether each rank holds the experts that a placement gives it.

    Args:
        held: What each rank holds.
        placement: The placement; expert groups are of consecutive ranks.
    """
    wrong = [
        f"rank {rank} holds {list(local)} of {name}"
        for rank, own in enumerate(held)
        for layer, (name, (local, _)) in zip(placement.moe_layers, own.items(), strict=True)
        if tuple(local) != placement.local_experts(layer, rank % placement.num_ranks)
    ]
    if wrong:
        return Check("experts", FAIL, f"not as the placement says: {some(wrong)}")
    spare = placement.num_ranks * placement.slots_per_rank - placement.num_experts
    return Check(
        "experts",
        PASS,
        f"{len(held)} ranks hold {placement.slots_per_rank} of {placement.num_experts} experts in "
        f"each of {len(placement.moe_layers)} layers, as placed: {spare} slots of a layer hold "
        "copies",
    )


def _wrong_in_group(held: Sequence[Held], first_rank: int) -> list[str]:
    layers = dict.fromkeys(name for own in held for name in own)
    wrong = []
    for name in layers:
        where: dict[int, list[int]] = defaultdict(list)
        num_experts = max(own[name][1] for own in held if name in own)
        for rank, own in enumerate(held, start=first_rank):
            for expert in own[name][0] if name in own else ():
                where[expert].append(rank)
        for expert in sorted({*range(num_experts), *where}):
            ranks = where[expert]
            if len(ranks) != 1 or expert >= num_experts:
                on = f"on ranks {ranks}" if ranks else "nowhere"
                wrong.append(f"expert {expert} of {name} is {on}")
    return wrong


def check_room_for_output(folder: Path, num_tokens: int) -> Check:
    """Compares the free disk space of the output's folder with what the results may take.

    Completions may end early, and a full disk loses nothing that is finished: so it is a warning.

    Args:
        folder: The folder.
        num_tokens: Tokens that are written at most.
    """
    needed = 2 * num_tokens * _OUTPUT_BYTES_PER_TOKEN  # journals, then the output
    free = free_bytes(str(folder))
    if free is None or free >= needed:
        told = "unknown" if free is None else f"{free / 2**30:,.1f} GiB"
        return Check("disk", PASS, f"{told} free for {needed / 2**20:,.2f} MiB of results")
    return Check(
        "disk",
        WARN,
        f"{free / 2**20:,.1f} MiB free in {folder}, results may take {needed / 2**20:,.1f} MiB: "
        "make room, or name another --output",
    )
