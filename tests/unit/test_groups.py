"""What is refused before ranks touch their GPUs (the groups work: tests/dist)."""

import pytest

from ds_moe_ep.dist.groups import refuse_missing_gpus
from ds_moe_ep.errors import PlanError

_HOSTS = ["a", "a", "b", "b", "c", "c"]


def test_all_hosts_with_fewer_gpus_than_slots_are_named():
    with pytest.raises(PlanError) as refused:
        refuse_missing_gpus(_HOSTS, [0, 1, 0, 1, 0, 1], [1, 1, 2, 2, 0, 0])
    assert str(refused.value).startswith("a: 1 GPUs for 2 slots; c: 0 GPUs for 2 slots. Write")


@pytest.mark.parametrize("num_gpus", [[2] * 6, [2, 2, 8, 8, 4, 4]])
def test_as_many_gpus_as_slots_or_more_are_enough(num_gpus):
    refuse_missing_gpus(_HOSTS, [0, 1, 0, 1, 0, 1], num_gpus)
