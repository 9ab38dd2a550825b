"""Which experts to keep on which rank, and which of them twice, so that ranks get equal loads.

Loads are what was recorded; nothing is measured, read or moved here.

Source: redundant experts and their rearrangement, DeepSeek-V3, section 3.4:
https://arxiv.org/abs/2412.19437. The algorithm is written from that description.
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ds_moe_ep.errors import PlanError
from ds_moe_ep.packing import pack
from ds_moe_ep.placement import SlotPlacement

__all__ = [
    "RankLayout",
    "balance",
    "balancedness",
    "contiguous_slots",
    "count_copies",
    "rank_loads",
]

# Copies of an expert on one host spare the network. That is given up where copies on any host
# would make the busiest rank's load less than this part of what it is with copies on one.
_WORTH_THE_NETWORK = 0.95
# How many parts of the spare slots are tried for the hottest experts, from all to none; what is
# balanced so well is not tried further.
_PARTS, _GOOD = 4, 0.995
# Smaller gains are rounding.
_LEAST_GAIN = 1e-9


@dataclass(frozen=True)
class RankLayout:
    """The ranks of an expert group, and what they have room for.

    Attributes:
        num_ranks: Ranks of the group.
        slots_per_rank: Experts of a layer that each holds.
        num_hosts: Hosts with as many of these ranks each, consecutive ones; 1 where hosts do not
            matter or have different numbers of ranks.
        num_groups: Groups of consecutive experts that a router chooses first (`n_group` of
            config.json) and that are to stay on one host; 1 if it chooses among all experts.
    """

    num_ranks: int
    slots_per_rank: int
    num_hosts: int = 1
    num_groups: int = 1

    @property
    def num_slots(self) -> int:
        """Slots of a layer on all ranks."""
        return self.num_ranks * self.slots_per_rank

    def check(self, num_experts: int) -> None:
        """Refuses slots that cannot be filled with the experts of a layer.

        Raises:
            PlanError: With the numbers of slots that can.
        """
        least = -(-num_experts // self.num_ranks)
        if not least <= self.slots_per_rank <= num_experts:
            why = (
                "each expert needs one"
                if self.slots_per_rank < least
                else "a rank would hold an expert twice"
            )
            raise PlanError(
                f"--slots-per-rank {self.slots_per_rank} on {self.num_ranks} ranks makes "
                f"{self.num_slots} slots for {num_experts} experts: {why}. Use {least} to "
                f"{num_experts}; with {least} there are "
                f"{least * self.num_ranks - num_experts} for copies."
            )
        if self.num_groups < 1 or num_experts % self.num_groups:
            raise PlanError(
                f"--expert-groups {self.num_groups} does not divide num_experts={num_experts}: "
                "groups are of equal size. Use n_group of the model's config.json."
            )


def balance(loads_of_layer: Mapping[int, Sequence[float]], layout: RankLayout) -> SlotPlacement:
    """Returns a placement for recorded loads, layer by layer; the same for the same input.

    In each layer the busiest rank has no more load than with contiguous experts. It is another rank
    in the next layer, as far as that evens out the loads of all layers together.

    Args:
        loads_of_layer: By MoE layer, the load of each expert: rows it computed, say.
        layout: The ranks.

    Raises:
        PlanError: The slots cannot be filled; see `RankLayout.check`.
    """
    num_experts = len(next(iter(loads_of_layer.values())))
    layout.check(num_experts)
    load_of_rank = [0.0] * layout.num_ranks
    placed = {}
    for layer, loads in loads_of_layer.items():
        ranks = _in_turn(_balance_layer(loads, layout), loads, load_of_rank, layout.num_hosts)
        load_of_rank = [a + b for a, b in zip(load_of_rank, _sums(loads, ranks), strict=True)]
        placed[layer] = tuple(expert for held in ranks for expert in sorted(held))
    return SlotPlacement(num_experts, layout.num_ranks, layout.slots_per_rank, placed)


def _balance_layer(loads: Sequence[float], layout: RankLayout) -> list[list[int]]:
    """Places the experts of one layer; returns those of each rank.

    No rank holds an expert twice, unless contiguous experts are what is best: then each rank's
    spare slots repeat its own.
    """
    experts = range(len(loads))
    found = _place(loads, experts, layout.num_ranks, layout.slots_per_rank)
    within = _copies_within_hosts(loads, layout)
    if within and _WORTH_THE_NETWORK * _most(loads, within) <= _most(loads, found):
        found = within
    kept = _contiguous(loads, layout)
    if kept and _most(loads, kept) < _most(loads, found) * (1 - _LEAST_GAIN):
        found = kept
    return found


def _in_turn(
    ranks: list[list[int]], loads: Sequence[float], load_of_rank: Sequence[float], num_hosts: int
) -> list[list[int]]:
    """Gives the fullest host of this layer to the one with the least load so far; ranks likewise.

    Args:
        ranks: Experts of each rank.
        loads: Load of each expert.
        load_of_rank: Load of each rank in the layers before.
        num_hosts: Hosts of as many consecutive ranks each.
    """
    size = len(ranks) // num_hosts
    own = _sums(loads, ranks)
    hosts = [range(host * size, (host + 1) * size) for host in range(num_hosts)]
    fullest = sorted(hosts, key=lambda host: -sum(own[rank] for rank in host))
    least = sorted(hosts, key=lambda host: sum(load_of_rank[rank] for rank in host))
    placed: list[list[int]] = [[] for _ in ranks]
    for given, taker in zip(fullest, least, strict=True):
        givers = sorted(given, key=lambda rank: -own[rank])
        takers = sorted(taker, key=lambda rank: load_of_rank[rank])
        for source, target in zip(givers, takers, strict=True):
            placed[target] = ranks[source]
    return placed


def contiguous_slots(num_experts: int, num_ranks: int) -> tuple[int, ...]:
    """Returns the expert of each slot without a placement: contiguous experts, one slot each.

    Raises:
        PlanError: The ranks cannot have equally many.
    """
    if num_experts % num_ranks:
        raise PlanError(
            f"{num_ranks} ranks cannot hold equally many of {num_experts} experts, so this is not "
            "the expert group of a run. Name its number of ranks: --ep-size N."
        )
    return tuple(range(num_experts))


def rank_loads(
    loads: Sequence[float], expert_of_slot: Sequence[int], num_ranks: int
) -> list[float]:
    """Returns the load of each rank, where the copies of an expert share its load evenly.

    Args:
        loads: Load of each expert.
        expert_of_slot: The expert of each slot, rank after rank.
        num_ranks: Ranks, with equally many slots.
    """
    slots_per_rank = len(expert_of_slot) // num_ranks
    starts = range(0, len(expert_of_slot), slots_per_rank)
    return _sums(loads, [expert_of_slot[start : start + slots_per_rank] for start in starts])


def balancedness(load_of_rank: Sequence[float]) -> float:
    """Returns mean / max, which is 1 if all ranks have the same load, or none has any."""
    most = max(load_of_rank)
    return sum(load_of_rank) / len(load_of_rank) / most if most else 1.0


def count_copies(
    loads: Sequence[float], num_slots: int, most: int, *, num_hot: int | None = None
) -> list[int]:
    """Returns how many copies experts get if each further slot goes to the hottest of them.

    The hottest is the one whose copies have the largest load each.

    Args:
        loads: Load of each expert.
        num_slots: All slots; at least one for each expert, and no more than `most` for each.
        most: Copies that an expert can have: one on each rank.
        num_hot: Further slots for the hottest, by default all; the rest goes to the coldest, whose
            copies weigh next to nothing wherever they are.
    """
    copies = [1] * len(loads)
    spare = num_slots - len(loads)
    num_hot = spare if num_hot is None else num_hot
    hottest = [(-load, expert) for expert, load in enumerate(loads)]
    heapq.heapify(hottest)
    for _ in range(num_hot):
        while copies[hottest[0][1]] == most:
            heapq.heappop(hottest)
        _, expert = hottest[0]
        copies[expert] += 1
        heapq.heapreplace(hottest, (-loads[expert] / copies[expert], expert))
    left = spare - num_hot
    for expert in sorted(range(len(loads)), key=lambda each: loads[each]):
        more = min(left, most - copies[expert])
        copies[expert] += more
        left -= more
    return copies


def _place(
    loads: Sequence[float], experts: Sequence[int], num_ranks: int, slots_per_rank: int
) -> list[list[int]]:
    """Spreads experts, some of them as copies, over ranks; returns the experts of each rank.

    Halving a load does not always help those who are to carry the halves, so it is tried with all
    spare slots for the hottest, and with fewer.
    """
    own = [loads[expert] for expert in experts]
    num_slots = num_ranks * slots_per_rank
    spare = num_slots - len(experts)
    good = sum(own) / num_ranks / _GOOD
    best: tuple[float, list[list[int]]] | None = None
    for num_hot in dict.fromkeys(spare * part // _PARTS for part in range(_PARTS, -1, -1)):
        copies = count_copies(own, num_slots, num_ranks, num_hot=num_hot)
        items = [(own[i] / copies[i], i) for i in range(len(own)) for _ in range(copies[i])]
        bins = pack(items, num_ranks, slots_per_rank)
        most = max(sum(load for load, _ in items) for items in bins)
        if best is None or most < best[0] * (1 - _LEAST_GAIN):
            best = most, [[experts[i] for _, i in items] for items in bins]
        if most <= good:
            break
    assert best is not None
    return best[1]


def _copies_within_hosts(loads: Sequence[float], layout: RankLayout) -> list[list[int]]:
    """Spreads experts over hosts first and then, with their copies, over the ranks of each.

    Returns:
        The experts of each rank; nothing if hosts cannot have equally many experts or groups of
        them, or have more slots than copies to fill them with.
    """
    num_hosts, num_experts = layout.num_hosts, len(loads)
    num_units = layout.num_groups if layout.num_groups > 1 else num_experts
    ranks_of_host, size = layout.num_ranks // num_hosts, num_experts // num_units
    if num_hosts == 1 or num_units % num_hosts or layout.slots_per_rank > num_experts // num_hosts:
        return []
    units = [(sum(loads[unit * size : (unit + 1) * size]), unit) for unit in range(num_units)]
    ranks: list[list[int]] = []
    for host in pack(units, num_hosts, num_units // num_hosts):
        experts = [
            unit * size + i
            for _, unit in sorted(host, key=lambda item: item[1])
            for i in range(size)
        ]
        ranks += _place(loads, experts, ranks_of_host, layout.slots_per_rank)
    return ranks


def _contiguous(loads: Sequence[float], layout: RankLayout) -> list[list[int]]:
    """Returns contiguous experts, and in spare slots the hottest of their rank again, if any."""
    num_local, rest = divmod(len(loads), layout.num_ranks)
    if rest:
        return []
    ranks = []
    for rank in range(layout.num_ranks):
        own = range(rank * num_local, (rank + 1) * num_local)
        hottest = sorted(own, key=lambda expert: -loads[expert])
        spare = layout.slots_per_rank - num_local
        ranks.append([*own, *(hottest[i % num_local] for i in range(spare))])
    return ranks


def _sums(loads: Sequence[float], ranks: Sequence[Sequence[int]]) -> list[float]:
    copies = Counter(expert for rank in ranks for expert in rank)
    return [sum(loads[expert] / copies[expert] for expert in rank) for rank in ranks]


def _most(loads: Sequence[float], ranks: Sequence[Sequence[int]]) -> float:
    return max(_sums(loads, ranks))
