"""The errors a user can meet: one class per domain, with the exit code of the command showing it.

A message is shown as `ClassName: message` without a traceback, so it names the field, the numbers
and the way out. This module holds no text of its own and no error handling.
"""

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "AdapterError",
    "BringUpError",
    "CheckpointError",
    "ConfigError",
    "DistributedError",
    "DsMoeEpError",
    "HostfileError",
    "InputError",
    "MegatronError",
    "ModelSpecError",
    "PlanError",
    "ResourceError",
    "nearest",
    "some",
]

_SHOWN = 5


class DsMoeEpError(Exception):
    """Anything this package refuses; `exit_code` 2 means that the user is to change something."""

    exit_code = 2


class HostfileError(DsMoeEpError):
    """A hostfile, or an include/exclude filter on it, that cannot be used."""


class ModelSpecError(DsMoeEpError):
    """A config.json that is missing, malformed or of a model that is not understood."""


class PlanError(DsMoeEpError):
    """Parallel sizes that do not fit the GPUs or the model."""


class ConfigError(DsMoeEpError):
    """A settings file or a command's settings that contradict each other."""


class CheckpointError(DsMoeEpError):
    """Weights that are missing, corrupt or not those the model needs."""


class AdapterError(DsMoeEpError):
    """A model whose blocks cannot be swapped."""


class MegatronError(DsMoeEpError):
    """Megatron that is not installed, or that refuses a model or its arguments."""


class BringUpError(DsMoeEpError):
    """Hosts, links or memory that do not pass a phase of the bring-up."""


class InputError(DsMoeEpError):
    """Prompts that cannot be read or served."""


class DistributedError(DsMoeEpError):
    """Ranks of a job that has started have lost each other."""

    exit_code = 1


class ResourceError(DsMoeEpError):
    """A machine that ran out of something, memory or disk, while the job ran on it."""

    exit_code = 1


def some(names: Sequence[str]) -> str:
    """Returns the first few of many names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the known name most like another one; empty if none is."""
    return next(iter(difflib.get_close_matches(name, known, n=1)), "")
