"""Predicts what the experts of a layer cost with each dispatcher: arithmetic, no tensors.

That is messages, sorting rows by rank before and summing them after, and the experts' work. Every
dispatcher computes the same (row, expert) pairs on the same ranks; but a GPU, whose shapes must not
depend on the routing, also moves the slots of rows that no expert here is to see. The prices are
measured by probe.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import median

from ds_moe_ep.memory_needs import share_wanted

__all__ = [
    "ExpertPrices",
    "GroupPrices",
    "LayerShape",
    "LinkPrices",
    "Price",
    "fit_prices",
    "predict_s",
]


@dataclass(frozen=True)
class Price:
    """What one kind of collective costs in one group: a latency and a price of bytes.

    Attributes:
        latency_s: Seconds of a collective without bytes.
        s_per_byte: Seconds for each byte of the rank that sends or receives most.
    """

    latency_s: float
    s_per_byte: float

    def seconds(self, num_bytes: float) -> float:
        """Returns the predicted seconds of one collective."""
        return self.latency_s + num_bytes * self.s_per_byte


@dataclass(frozen=True)
class GroupPrices:
    """The prices of one group.

    Attributes:
        size: Its ranks.
        counts_s: Seconds to exchange numbers of rows, until the host knows them.
        exchange: Rows to some ranks each, as many as there are.
        gather: All rows to all ranks.
        reduce: The sum over ranks of what each has for the rows of all.
    """

    size: int
    counts_s: float
    exchange: Price
    gather: Price
    reduce: Price


@dataclass(frozen=True)
class ExpertPrices:
    """What the experts of a rank cost.

    Attributes:
        s_per_pair: Seconds for each pair of a row and an expert that it chose: the products.
        s_per_slot: Seconds for each top-k slot that a GPU moves, whether its expert is here or not.
            (Where a rank's one expert multiplies all of few rows, this counts microseconds too
            many.)
    """

    s_per_pair: float
    s_per_slot: float


@dataclass(frozen=True)
class LinkPrices:
    """The prices of an expert group, and of its two levels where it has them.

    Attributes:
        flat: All ranks.
        across: The ranks with this rank's place on every node.
        within: The ranks of this node.
        local_s_per_byte: Seconds for each byte that a rank copies into rows for some ranks each,
            and sums up again when they have come back.
        experts: What the experts themselves cost; None where it was not measured, as on a CPU,
            which computes the same pairs with every dispatcher, and no others.
    """

    flat: GroupPrices
    across: GroupPrices | None = None
    within: GroupPrices | None = None
    local_s_per_byte: float = 0.0
    experts: ExpertPrices | None = None


@dataclass(frozen=True)
class LayerShape:
    """What of a layer decides how much is sent.

    Attributes:
        num_experts: Experts over all ranks.
        top_k: Experts a token chooses.
        row_bytes: Bytes of a token's hidden state.
    """

    num_experts: int
    top_k: int
    row_bytes: int

    @property
    def routed_row_bytes(self) -> int:
        """Bytes of a row with its expert ids and weights."""
        return self.row_bytes + 8 * self.top_k

    def share_wanted(self, num_local_experts: int) -> float:
        """Returns how likely a token wants any of so many experts, if all are chosen equally."""
        return share_wanted(self.num_experts, num_local_experts, self.top_k)


def fit_prices(samples_of: Mapping[str, Sequence[tuple[int, float]]]) -> dict[str, Price]:
    """Fits prices to measured seconds of small and large messages.

    The quickest of each size counts, as other work on the machine only ever adds to one. Bytes cost
    the same in all kinds of collectives: the median of what each says.

    Args:
        samples_of: Bytes and seconds of each measurement, of two sizes, by kind of collective.

    Returns:
        The price of each kind, neither its latency nor that of bytes below zero.
    """
    points = {}
    for kind, samples in samples_of.items():
        sizes = min(samples)[0], max(samples)[0]
        points[kind] = [
            (size, min(s for num_bytes, s in samples if num_bytes == size)) for size in sizes
        ]
    slopes = [
        (large_s - small_s) / (large - small) if large > small else 0.0
        for (small, small_s), (large, large_s) in points.values()
    ]
    slope = max(0.0, median(slopes))
    return {
        kind: Price(max(0.0, small_s - slope * small), slope)
        for kind, ((small, small_s), _) in points.items()
    }


@lru_cache(maxsize=256)  # asked by every layer of a pass
def predict_s(
    prices: LinkPrices, shape: LayerShape, num_tokens: tuple[int, ...]
) -> dict[str, float]:
    """Predicts the seconds of a layer's collectives, and of its experts if their prices are known.

    Args:
        prices: What was measured of the group.
        shape: The layer.
        num_tokens: Tokens of each rank of the group.

    Returns:
        Seconds by dispatcher; the two-level ones only where their prices are known.
    """
    local = prices.local_s_per_byte
    own_share = shape.share_wanted(shape.num_experts // prices.flat.size)
    is_bare = shape.num_experts == prices.flat.size  # to a rank of one expert rows go bare
    routed_s, gathered_s = _experts_s(prices, shape, sum(num_tokens), own_share, is_bare=is_bare)
    predicted = {
        "alltoall": routed_s
        + _exchange_s(prices.flat, shape, num_tokens, own_share, local, is_bare=is_bare),
        "allgather": _gather_s(prices.flat, shape, num_tokens) + gathered_s,
    }
    if prices.across is None or prices.within is None:
        return predicted
    across, within = prices.across, prices.within
    places = range(within.size)
    columns = [list(num_tokens[place :: within.size]) for place in places]
    node_share = shape.share_wanted(shape.num_experts // across.size)
    predicted["alltoall-2level"] = (
        max(_exchange_s(across, shape, column, node_share, local) for column in columns)
        + _exchange_s(
            within,
            shape,
            [node_share * sum(column) for column in columns],
            own_share / node_share,
            local,
            is_bare=is_bare,
        )
        + routed_s
    )
    predicted["allgather-2level"] = (
        max(_gather_s(across, shape, column) for column in columns)
        + _gather_s(within, shape, [sum(column) for column in columns])
        + gathered_s
    )
    return predicted


def _experts_s(
    prices: LinkPrices, shape: LayerShape, num_tokens: int, own_share: float, *, is_bare: bool
) -> tuple[float, float]:
    """The work of a rank's experts: where routed rows come to it, and where all rows do."""
    if prices.experts is None:
        return 0.0, 0.0
    pairs_s = num_tokens * shape.top_k / prices.flat.size * prices.experts.s_per_pair
    if is_bare:  # a row has one slot for the one expert; bare rows have none
        return pairs_s, pairs_s + num_tokens * prices.experts.s_per_slot
    slots_s = num_tokens * shape.top_k * prices.experts.s_per_slot
    return pairs_s + own_share * slots_s, pairs_s + slots_s


def _exchange_s(
    prices: GroupPrices,
    shape: LayerShape,
    num_tokens: Sequence[float],
    share: float,
    local_s_per_byte: float,
    *,
    is_bare: bool = False,
) -> float:
    """Counts, rows out and rows back, where each rank wants a share of every rank's rows."""
    rows = share * _most_rows(num_tokens)
    local_rows = share * prices.size * max(num_tokens)  # those that stay here among them
    sent_row_bytes = shape.row_bytes if is_bare else shape.routed_row_bytes
    return (
        prices.counts_s
        + local_rows * shape.row_bytes * local_s_per_byte
        + prices.exchange.seconds(rows * sent_row_bytes)
        + prices.exchange.seconds(rows * shape.row_bytes)
    )


def _gather_s(prices: GroupPrices, shape: LayerShape, num_tokens: Sequence[int]) -> float:
    rows = _most_rows(num_tokens)
    return prices.gather.seconds(rows * shape.routed_row_bytes) + prices.reduce.seconds(
        rows * shape.row_bytes
    )


def _most_rows(num_tokens: Sequence[float]) -> float:
    """Returns the rows that the busiest rank sends or receives if all go everywhere."""
    total = sum(num_tokens)
    return max(max((len(num_tokens) - 1) * own, total - own) for own in num_tokens)
