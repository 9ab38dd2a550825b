"""Packs items of different loads into bins of equal capacity, so that the fullest has little.

What items and bins stand for is balance.py's business: experts and ranks, or groups and hosts.
"""

from collections.abc import Sequence

__all__ = ["Item", "pack"]

# Smaller gains are rounding.
_LEAST_GAIN = 1e-9

Item = tuple[float, int]
"""A load, and the number of what has it."""


def pack(items: Sequence[Item], num_bins: int, capacity: int) -> list[list[Item]]:
    """Puts items into bins, as many into each, so that the fullest has little load.

    The heaviest left goes to the lightest bin that has room and not that item yet; then items are
    exchanged for as long as that helps the fullest bin.

    Args:
        items: As many as fill all bins; no more of one number than there are bins.
        num_bins: Bins.
        capacity: Items of each.
    """
    bins: list[list[Item]] = [[] for _ in range(num_bins)]
    load_of_bin = [0.0] * num_bins
    for item in sorted(items, key=lambda item: (-item[0], item[1])):
        lightest = sorted(range(num_bins), key=lambda each: (load_of_bin[each], each))
        with_room = [each for each in lightest if len(bins[each]) < capacity]
        free = [each for each in with_room if item not in bins[each]]
        if free:
            bins[free[0]].append(item)
            load_of_bin[free[0]] += item[0]
            continue
        # All bins with room have it: one without gives up what such a bin has not got.
        room = with_room[0]
        other = next(each for each in lightest if item not in bins[each])
        given = next(each for each in reversed(bins[other]) if each not in bins[room])
        bins[other][bins[other].index(given)] = item
        bins[room].append(given)
        load_of_bin[other] += item[0] - given[0]
        load_of_bin[room] += given[0]
    while _exchange(bins, load_of_bin):
        pass
    return bins


def _exchange(bins: list[list[Item]], load_of_bin: list[float]) -> bool:
    """Exchanges two items, one of the fullest bin, if that makes this and the other less full."""
    fullest = max(range(len(bins)), key=lambda each: (load_of_bin[each], -each))
    most = load_of_bin[fullest]
    best = (most * (1 - _LEAST_GAIN), -1, 0, 0)
    for other, load in enumerate(load_of_bin):
        for i, given in enumerate(bins[fullest]):
            for j, taken in enumerate(bins[other]):
                moved = given[0] - taken[0]
                after = max(most - moved, load + moved)
                if after < best[0] and given not in bins[other] and taken not in bins[fullest]:
                    best = (after, other, i, j)
    _, other, i, j = best
    if other < 0:
        return False
    given, taken = bins[fullest][i], bins[other][j]
    bins[fullest][i], bins[other][j] = taken, given
    load_of_bin[fullest] += taken[0] - given[0]
    load_of_bin[other] += given[0] - taken[0]
    return True
