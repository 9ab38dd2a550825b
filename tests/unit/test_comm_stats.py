"""Counting what collectives cost: durations against the sorted list of all."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ds_moe_ep.dist import comm_stats
from ds_moe_ep.dist.comm_stats import CommStats
from ds_moe_ep.dist.durations import Durations

_CPU = torch.device("cpu")
_SECONDS = st.lists(st.floats(1e-7, 1e3), min_size=1, max_size=200)


def _of(values):
    durations = Durations()
    for value in values:
        durations.add(value)
    return durations


@given(_SECONDS, st.sampled_from([0.5, 0.95, 1.0]))
def test_quantiles_are_at_most_a_bucket_too_long(values, share):
    ordered = sorted(values)
    exact = next(v for i, v in enumerate(ordered, start=1) if i >= share * len(ordered))
    assert exact <= _of(values).quantile(share) * (1 + 1e-9)
    assert _of(values).quantile(share) <= exact * 2 ** (1 / 8) * (1 + 1e-9)


@given(_SECONDS, _SECONDS)
def test_merging_is_the_same_as_counting_together(first, second):
    merged, together = Durations.merged([_of(first), _of(second)]), _of(first + second)
    assert merged.histogram() == together.histogram()
    assert merged.quantiles() == together.quantiles()
    assert merged.total_s == pytest.approx(sum(first + second))
    assert sum(count for _, count in merged.histogram()) == merged.count == len(first + second)


def test_of_none_there_are_no_quantiles():
    assert Durations().quantiles() is None and Durations().quantile(0.5) == 0.0


def test_collectives_count_by_kind_without_the_work_done_meanwhile():
    stats = CommStats()
    for _ in range(3):
        with stats.timed("gather", _CPU, sent_bytes=10), stats.untimed(_CPU):
            time.sleep(0.05)
    with stats.timed("sum", _CPU, sent_bytes=7):
        time.sleep(0.02)
    assert stats.calls == 4 and stats.sent_bytes == 37
    kinds = stats.by_kind
    assert {name: kind.durations.count for name, kind in kinds.items()} == {"gather": 3, "sum": 1}
    assert kinds["gather"].durations.max_s < 0.04
    assert kinds["sum"].durations.quantile(0.5) >= 0.02
    assert stats.seconds() == pytest.approx(sum(k.durations.total_s for k in kinds.values()))
    stats.reset()
    assert (stats.calls, stats.sent_bytes, stats.seconds()) == (0, 0, 0.0)


class _QueuedEvent:
    """An event of a GPU that has not come to it, and which a capture must not ask."""

    def __init__(self):
        self.may_be_asked = True

    def query(self):
        assert self.may_be_asked, "asked during a capture"
        return False


def test_while_a_graph_is_captured_no_event_is_recorded_or_asked(monkeypatch):
    recorded, is_capturing = [], False

    def record(device):
        assert not is_capturing, "recorded during a capture"
        recorded.append(_QueuedEvent())
        return recorded[-1]

    monkeypatch.setattr(comm_stats, "now", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: is_capturing)
    stats, gpu = CommStats(), torch.device("cuda")
    with stats.timed("gather", gpu, sent_bytes=10):
        pass
    is_capturing = True
    for event in recorded:
        event.may_be_asked = False
    with stats.timed("gather", gpu, sent_bytes=10), stats.untimed(gpu):
        pass
    assert len(recorded) == 2
    assert stats.sent_bytes == 10
