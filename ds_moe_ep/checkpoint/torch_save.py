"""What `torch.save` writes: to a file that is hashed on its way, and how large it will be.

What is saved is decided where it is called.
"""

from __future__ import annotations

import functools
import io
from typing import IO, Any, cast

import torch

__all__ = ["saved", "saved_bytes", "torch_save"]


def torch_save(content: Any, out: IO[bytes]) -> None:
    """Writes an object as `torch.save` does.

    Args:
        content: A tensor, or containers of some.
        out: Is written in order, without seeking.

    Raises:
        OSError: It could not be written.
    """
    try:
        torch.save(content, out)
    except RuntimeError as error:
        # torch ends its archive even when it could not be written, and complains of that instead.
        raise error.__context__ or error from None


def saved(content: Any) -> bytes:
    """Returns what `torch_save` would write."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@functools.cache
def saved_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Returns how many bytes `torch_save` writes of a tensor; they depend on nothing else.

    Takes the memory of such a tensor.
    """
    counter = _Counter()
    torch.save(torch.empty(shape, dtype=dtype), cast(IO[bytes], counter))
    return counter.num_bytes


class _Counter:
    """A file that only counts what is written to it."""

    def __init__(self) -> None:
        self.num_bytes = 0

    def write(self, chunk: bytes | memoryview) -> int:
        self.num_bytes += len(chunk)
        return len(chunk)

    def flush(self) -> None:
        """Nothing is kept."""
