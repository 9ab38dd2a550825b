"""Locks a file, so that one process at a time writes what lies beside it.

The system gives the lock free when its holder has ended, however that was.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import warnings
from collections.abc import Callable
from pathlib import Path

from ds_moe_ep.errors import DsMoeEpError

__all__ = ["is_at", "open_locked"]


def open_locked(path: Path, flags: int, refusal: Callable[[str], DsMoeEpError]) -> int | None:
    """Opens a file and locks it, until it is closed or this process ends.

    A file system without locks is warned of, and does not stop anybody.

    Args:
        path: The file.
        flags: How to open it, as ``os.open`` takes them; to read at least.
        refusal: Makes what is raised if another process has the lock, from what the file holds.

    Returns:
        Its descriptor; None if there is no such file, or its holder has just removed it.
    """
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, flags, 0o666)
        try:
            _lock(descriptor, path, refusal)
            if is_at(path, descriptor):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    return None


def is_at(path: Path, descriptor: int) -> bool:
    """Returns whether what is open is the file of this name; FileNotFoundError if none is."""
    return os.path.samestat(os.fstat(descriptor), path.stat())


def _lock(descriptor: int, path: Path, refusal: Callable[[str], DsMoeEpError]) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise refusal(os.read(descriptor, 200).decode(errors="replace")) from None
    except OSError as error:
        warnings.warn(
            f"{path.parent}: cannot be locked ({error.strerror}). See to it that no second process "
            "writes there.",
            stacklevel=1,  # one place, so that it is said once
        )
