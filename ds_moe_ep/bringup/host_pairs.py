"""Times messages between every two hosts of a job, and names the slowest pair.

One rank of each host takes part, all pairs of a round at the same time.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from statistics import median

import torch
import torch.distributed as dist

from ds_moe_ep.bringup.report import PASS, WARN, Check
from ds_moe_ep.dist.groups import Job
from ds_moe_ep.dist.node_groups import first_ranks

__all__ = ["check_pairs", "judge_pairs", "rounds"]

# Above this many times the median a pair is an outlier, and not the size of its message.
_OUTLIER = 2.0
_FEW, _MANY = 3, 20


def rounds(num_hosts: int) -> list[list[tuple[int, int]]]:
    """Pairs all hosts with all others, each at most once a round, in as few rounds as it takes.

    That is one less than there are hosts, or as many if their number is odd.

    Source:
        The circle method of round-robin tournaments.
    """
    places = list(range(num_hosts + num_hosts % 2))  # with an odd number one is nobody
    found = []
    for _ in range(len(places) - 1):
        pairs = zip(places[: len(places) // 2], reversed(places), strict=False)
        found.append([(min(p), max(p)) for p in pairs if max(p) < num_hosts])
        places = [places[0], places[-1], *places[1:-1]]
    return found


def check_pairs(job: Job, num_bytes: int, *, thorough: bool) -> Check | None:
    """Times a message there and back between all pairs of hosts; all ranks call it.

    Args:
        job: The job.
        num_bytes: Size of the message.
        thorough: Whether to take the median of many messages or of a few.

    Returns:
        None where there is one host, or where a GPU would open a channel for each pair and the job
        is in a hurry.
    """
    firsts = first_ranks(job.nodes)
    if len(firsts) < 2 or (job.device.type == "cuda" and not thorough):
        return None
    own: dict[tuple[int, int], float] = {}
    if job.info.rank in firsts:
        me = firsts.index(job.info.rank)
        message = torch.zeros(max(1, num_bytes), dtype=torch.uint8, device=job.device)
        for pairs in rounds(len(firsts)):
            for pair in pairs:
                if me in pair:
                    ms = _there_and_back_ms(
                        message, firsts[sum(pair) - me], me == pair[0], _MANY if thorough else _FEW
                    )
                    if me == pair[0]:
                        own[pair] = ms
    of_pair = {pair: ms for told in job.all_gather(own) for pair, ms in told.items()}
    return judge_pairs(of_pair, [job.hosts[rank] for rank in firsts], num_bytes)


def judge_pairs(
    of_pair: Mapping[tuple[int, int], float], hosts: Sequence[str], num_bytes: int
) -> Check:
    """Names the slowest pair of hosts, and warns if it is far from the others.

    Args:
        of_pair: Milliseconds of each pair, one way, by the places of its hosts.
        hosts: Their names.
        num_bytes: Size of the message.
    """
    (first, second), slowest = max(of_pair.items(), key=lambda item: item[1])
    middle = median(of_pair.values())
    text = f"slowest is {hosts[first]} - {hosts[second]}: {slowest:.3g} ms one way, {num_bytes:,} B"
    if len(of_pair) == 1:
        return Check("pairs of hosts", PASS, f"{text}; there is no other pair", slowest, unit="ms")
    text += f"; {slowest / middle:.2g} times the median of {len(of_pair)} pairs, {middle:.3g} ms"
    if slowest <= _OUTLIER * middle:
        return Check("pairs of hosts", PASS, text, slowest, _OUTLIER * middle, "ms")
    excluded = shlex.join(["--exclude", hosts[second]])
    text += f". Look at the cables and ports of both, or exclude one: {excluded}"
    return Check("pairs of hosts", WARN, text, slowest, _OUTLIER * middle, "ms")


def _there_and_back_ms(message: torch.Tensor, other: int, begins: bool, num_runs: int) -> float:
    """Sends a message to another rank and back, and returns the median time of one way."""
    seconds = []
    for _ in range(num_runs + 1):
        start_s = time.perf_counter()
        if begins:
            dist.send(message, other)
            dist.recv(message, other)
        else:
            dist.recv(message, other)
            dist.send(message, other)
        if message.is_cuda:
            torch.cuda.synchronize(message.device)
        seconds.append(time.perf_counter() - start_s)
    return median(seconds[1:]) / 2 * 1e3  # the first waits for the other rank, and opens channels
