"""Process groups that wait as long as the job's own group does.

torch gives each further group a timeout of its own, half an hour for gloo, and DeepSpeed, which
makes the expert groups, has no argument for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

__all__ = ["same_timeout_for_new_groups", "timeout_of"]


def timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """Returns how long a group waits for its ranks; None for a group that never waits (fake)."""
    options = group._get_backend(group._device_types[0]).options
    return options._timeout if options is not None else None


@contextlib.contextmanager
def same_timeout_for_new_groups() -> Iterator[None]:
    """Gives process groups that are made meanwhile the timeout of the default group."""
    new_group = torch.distributed.new_group
    torch.distributed.new_group = partial(new_group, timeout=timeout_of(dist.group.WORLD))
    try:
        yield
    finally:
        torch.distributed.new_group = new_group
