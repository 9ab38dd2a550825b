"""What the C library does with memory that a program frees.

Tensors come from its heap. Elsewhere than with glibc these functions do nothing.
"""

from __future__ import annotations

import ctypes

__all__ = ["give_freed_memory_back", "keep_freed_memory", "release_freed_memory"]

# mallopt's options by their numbers in glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3

# Below this size tensors stay in the heap, where not every one takes new pages from the kernel.
_LEAST_MMAP_BYTES = 1 << 20
_LEAST_KEPT_BYTES = 1 << 17  # glibc's default
# The highest that glibc itself raises it to.
_MOST_MMAP_BYTES = 1 << 25
_MOST_KEPT_BYTES = 1 << 30


def give_freed_memory_back() -> None:
    """Lets large tensors have mappings of their own, which the system gets back at once."""
    _call("mallopt", _M_MMAP_THRESHOLD, _LEAST_MMAP_BYTES)
    _call("mallopt", _M_TRIM_THRESHOLD, _LEAST_KEPT_BYTES)


def keep_freed_memory() -> None:
    """Keeps what is freed, up to 1 GiB, for what is allocated next.

    Else every layer would take its temporary tensors' pages anew from the kernel, which clears
    them first: on a CPU that took up to half of the time of an MoE layer.
    """
    _call("mallopt", _M_MMAP_THRESHOLD, _MOST_MMAP_BYTES)
    _call("mallopt", _M_TRIM_THRESHOLD, _MOST_KEPT_BYTES)


def release_freed_memory() -> None:
    """Gives all that was freed before, and kept, back to the system."""
    _call("malloc_trim", 0)


def _call(name: str, *args: int) -> None:
    function = getattr(ctypes.CDLL(None), name, None)
    if function is not None:
        function(*args)
