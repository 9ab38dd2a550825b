"""Packs tensors that belong together row by row into one tensor, and unpacks them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RowLayout"]

# Every tensor of a packed row starts at a multiple of this many bytes, so that a received row can
# be viewed in place.
_ALIGNMENT_BYTES = 16


class RowLayout:
    """Where each tensor lies in a packed row. One tensor alone is sent as it is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._dtypes = [tensor.dtype for tensor in tensors]
        widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
        # Words are as wide as they can be: a GPU copies what it joins one by one.
        self._word = torch.uint8 if any(width % 4 for width in widths) else torch.int32
        self._widths = [width // self._word.itemsize for width in widths]
        self._gaps = [-width % _ALIGNMENT_BYTES // self._word.itemsize for width in widths]

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the rows as words ``[S, C]``; a tensor alone as it is."""
        if len(tensors) == 1:
            return tensors[0].contiguous()
        parts = []
        for tensor, gap in zip(tensors, self._gaps, strict=True):
            parts.append(tensor.contiguous().view(self._word))
            if gap:
                parts.append(parts[-1].new_zeros((tensor.shape[0], gap)))
        return torch.cat(parts, dim=1)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the tensors in packed rows."""
        if len(self._dtypes) == 1:
            return (rows,)
        sizes = [size for both in zip(self._widths, self._gaps, strict=True) for size in both]
        parts = rows.split(sizes, dim=1)[::2]
        return tuple(part.view(dtype) for part, dtype in zip(parts, self._dtypes, strict=True))
