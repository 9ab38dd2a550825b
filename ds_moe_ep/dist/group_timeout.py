"""Process groups that wait as long as the job's own group does.

torch gives each further group a timeout of its own, half an hour for gloo, and DeepSpeed, which
makes the expert groups, has no argument for it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

__all__ = ["WATCHDOG_MARGIN_S", "patience_of", "same_timeout_for_new_groups", "timeout_of"]

WATCHDOG_MARGIN_S = 30.0
"""By how much NCCL's watchdog, which ends a process without a word, waits longer than a rank does.

In this time the rank that has waited says who does not answer.
"""


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Returns how long a group waits for its ranks; None for a group that never waits (fake)."""
    options = group._get_backend(group._device_types[0]).options
    return options._timeout if options is not None else None


def patience_of(group: dist.ProcessGroup | None) -> float:
    """Returns for how many seconds a rank waits for its GPU to hear of the others of a group."""
    timeout = None if group is None else timeout_of(group)
    if timeout is None:
        return math.inf
    timeout_s = timeout.total_seconds()
    return max(timeout_s - WATCHDOG_MARGIN_S, timeout_s / 2)  # of a group that others have made


@contextlib.contextmanager
def same_timeout_for_new_groups() -> Iterator[None]:
    """Gives process groups that are made meanwhile the timeout of the default group."""
    new_group = torch.distributed.new_group
    torch.distributed.new_group = partial(new_group, timeout=timeout_of(dist.group.WORLD))
    try:
        yield
    finally:
        torch.distributed.new_group = new_group
