"""Packs tensors that belong together row by row into one row of bytes, and unpacks them again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["RowLayout"]

# Every tensor of a packed row starts at a multiple of this many bytes, so that a received row can
# be viewed in place.
_ALIGNMENT_BYTES = 16


class RowLayout:
    """Where each tensor lies in a packed row of bytes. One tensor alone is sent as it is."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.dtypes = [tensor.dtype for tensor in tensors]
        self.widths = [tensor.shape[1] * tensor.element_size() for tensor in tensors]
        self.offsets = [0]
        for width in self.widths:
            self.offsets.append(
                -(-(self.offsets[-1] + width) // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            )

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Returns the rows as bytes ``[S, B]``; a tensor alone as it is."""
        if len(tensors) == 1:
            return tensors[0].contiguous()
        rows = tensors[0].new_empty((tensors[0].shape[0], self.offsets[-1]), dtype=torch.uint8)
        for part, tensor in zip(self._parts(rows), tensors, strict=True):
            part.copy_(tensor)
        return rows

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Returns views of the tensors in packed rows."""
        return (rows,) if len(self.dtypes) == 1 else tuple(self._parts(rows))

    def _parts(self, rows: Tensor) -> list[Tensor]:
        return [
            rows[:, offset : offset + width].view(dtype)
            for offset, width, dtype in zip(self.offsets, self.widths, self.dtypes, strict=False)
        ]
