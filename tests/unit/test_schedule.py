"""Spreading prompts over ranks: nothing lost, nothing twice, equal work, and known small cases."""

from itertools import chain, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.engine.schedule import Batch, replicate, spread


def _indices(batches):
    return [index for batch in batches for index in batch.indices]


def _loads(schedule, lengths, max_new_tokens):
    return [
        sum(lengths[index] + max_new_tokens for index in _indices(batches)) for batches in schedule
    ]


@pytest.mark.parametrize(
    ("lengths", "world_size", "batch_size", "expected"),
    [
        ([], 2, 4, [[], []]),
        ([3, 3, 3], 4, 8, [[(0,)], [(1,)], [(2,)], []]),
        ([5], 8, 1, [[(0,)]] + [[]] * 7),
        # 9+1 | 7+1 | then 5+1 to rank 1 (14), 4+1 to rank 0 (15), 1+1 to rank 1 (16)
        ([4, 9, 1, 7, 5], 2, 2, [[(1, 0)], [(3, 4), (2,)]]),
        ([2, 2, 2, 2, 2], 1, 2, [[(0, 1), (2, 3), (4,)]]),
    ],
)
def test_small_cases_by_hand(lengths, world_size, batch_size, expected):
    schedule = spread(lengths, world_size, batch_size, max_new_tokens=1)
    assert schedule == [[Batch(indices) for indices in batches] for batches in expected]


def test_new_tokens_count_as_work():
    # By prompt tokens alone rank 1 would take all the short ones: 10 | 1+1+1.
    schedule = spread([10, 1, 1, 1], 2, 8, max_new_tokens=100)
    assert [len(_indices(batches)) for batches in schedule] == [2, 2]


def test_a_batch_without_padding_has_prompts_of_one_length():
    lengths = [2, 5, 2, 5, 5, 3]
    expected = [Batch((1, 3)), Batch((4,)), Batch((5,)), Batch((0, 2))]
    assert spread(lengths, 1, 2, max_new_tokens=1, takes_padding=False) == [expected]
    assert replicate(lengths, 2, 2, takes_padding=False) == [expected] * 2
    assert replicate(lengths, 1, 2) == [[Batch((1, 3)), Batch((4, 5)), Batch((0, 2))]]


_LENGTHS = st.lists(st.integers(1, 4096), max_size=200)


@given(_LENGTHS, st.integers(1, 64), st.integers(1, 16), st.integers(0, 512))
def test_every_prompt_once_in_batches_that_fit(lengths, world_size, batch_size, max_new_tokens):
    schedule = spread(lengths, world_size, batch_size, max_new_tokens=max_new_tokens)
    assert len(schedule) == world_size
    assert sorted(chain.from_iterable(map(_indices, schedule))) == list(range(len(lengths)))
    for batches in schedule:
        assert all(len(batch.indices) == batch_size for batch in batches[:-1])
        assert all(1 <= len(batch.indices) <= batch_size for batch in batches)
        served = [lengths[index] for index in _indices(batches)]
        assert served == sorted(served, reverse=True)


@given(_LENGTHS, st.integers(1, 64), st.integers(0, 512))
def test_no_rank_is_ahead_by_more_than_its_last_prompt(lengths, world_size, max_new_tokens):
    """When a rank got its last prompt, no rank had less work than it."""
    schedule = spread(lengths, world_size, 4, max_new_tokens=max_new_tokens)
    loads = _loads(schedule, lengths, max_new_tokens)
    for batches, load in zip(schedule, loads, strict=True):
        if batches:
            last = lengths[_indices(batches)[-1]] + max_new_tokens
            assert load - last <= min(loads)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=7), st.integers(2, 3))
def test_the_bound_of_the_greedy_rule_holds_against_the_best_spread(lengths, world_size):
    best = min(
        max(
            sum(length for length, owner in zip(lengths, owners, strict=True) if owner == rank)
            for rank in range(world_size)
        )
        for owners in product(range(world_size), repeat=len(lengths))
    )
    loads = _loads(spread(lengths, world_size, 4, max_new_tokens=0), lengths, 0)
    assert 3 * world_size * max(loads) <= (4 * world_size - 1) * best


@given(st.integers(0, 300), st.integers(1, 64))
def test_equal_prompts_are_spread_evenly(num_prompts, world_size):
    schedule = spread([7] * num_prompts, world_size, 4, max_new_tokens=16)
    counts = [len(_indices(batches)) for batches in schedule]
    assert max(counts) - min(counts) <= 1


def test_every_rank_gets_all_prompts_in_the_same_batches():
    schedule = replicate([3, 9, 5], 2, 2)
    assert schedule == [[Batch((1, 2)), Batch((0,))]] * 2
