"""A torch_dist checkpoint on disk, as Megatron or torch_dist.py has written it.

It tells where the bytes of any rows of a tensor lie, however they were spread over ranks. What the
tensors mean is decided in names.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ds_moe_ep.checkpoint.files import MEGATRON_METADATA, MEGATRON_TRACKER
from ds_moe_ep.checkpoint.header import StoredTensor
from ds_moe_ep.checkpoint.megatron.metadata import Place, read_places
from ds_moe_ep.checkpoint.megatron.torch_dist import METADATA_JSON
from ds_moe_ep.checkpoint.pickled import read_pickled_tensor
from ds_moe_ep.errors import CheckpointError

__all__ = ["TorchDist", "open_torch_dist"]

_Part = tuple[range, StoredTensor]
"""Some rows of a tensor, and where they lie."""


@dataclass(frozen=True)
class TorchDist:
    """An opened checkpoint.

    Attributes:
        folder: The folder with its files.
        shapes: The shapes of its tensors, by name.
    """

    folder: Path
    shapes: Mapping[str, tuple[int, ...]]
    _places: Mapping[str, list[Place]]
    _parts: dict[tuple[str, int], dict[tuple[int, ...], list[_Part]]] = field(default_factory=dict)

    def rows(self, key: str, index: tuple[int, ...], rows: range) -> list[StoredTensor]:
        """Returns where rows of a tensor lie, in order.

        Args:
            key: Its name.
            index: The place in its leading dimensions.
            rows: Rows of the dimension after these.

        Raises:
            CheckpointError: Some of them are not in the checkpoint, a file is not whole, or rows
                were cut into columns.
        """
        if (key, len(index)) not in self._parts:
            self._parts[key, len(index)] = self._find_parts(key, len(index))
        found = []
        next_row = rows.start
        for have, tensor in self._parts[key, len(index)].get(index, []):
            if have.start <= next_row < min(have.stop, rows.stop):
                stop = min(have.stop, rows.stop)
                found.append(tensor.cut(range(next_row - have.start, stop - have.start)))
                next_row = stop
        if next_row < rows.stop:
            at = f" at {[*index]}" if index else ""
            raise CheckpointError(
                f"{self.folder}: row {next_row} of {key}{at} is in none of its files. {_AGAIN}"
            )
        return found

    def _find_parts(self, key: str, num_leading: int) -> dict[tuple[int, ...], list[_Part]]:
        parts: dict[tuple[int, ...], list[_Part]] = defaultdict(list)
        for place in self._places[key]:
            if place.sizes[num_leading + 1 :] != self.shapes[key][num_leading + 1 :]:
                raise CheckpointError(
                    f"{self.folder}: {key} {[*self.shapes[key]]} was saved in columns, a part is "
                    f"{[*place.sizes]}. Load it in Megatron with "
                    "--tensor-model-parallel-size 1, save it again, and convert that."
                )
            for index, part in _split(place, num_leading):
                parts[index].append(part)
        for found in parts.values():
            found.sort(key=lambda part: (part[0].start, part[0].stop))
        return parts


def _split(place: Place, num_leading: int) -> Iterator[tuple[tuple[int, ...], _Part]]:
    """Yields what a part holds at each place in the leading dimensions."""
    path = place.path
    size = path.stat().st_size if path.is_file() else None
    if size is None or size < place.start + place.num_bytes:
        found = "is missing" if size is None else f"has {size:,} bytes"
        raise CheckpointError(
            f"{path} {found}, {MEGATRON_METADATA} says at least "
            f"{place.start + place.num_bytes:,} bytes. {_AGAIN}"
        )
    stored = read_pickled_tensor(path, place.start, place.num_bytes)
    if stored.shape != place.sizes:
        raise CheckpointError(
            f"{path}: a tensor of {[*stored.shape]} lies where {MEGATRON_METADATA} says "
            f"{[*place.sizes]}. {_AGAIN}"
        )
    pending: list[tuple[tuple[int, ...], StoredTensor]] = [((), stored)]
    for dim in range(num_leading):
        pending = [
            ((*index, place.offsets[dim] + number), _row(tensor, number))
            for index, tensor in pending
            for number in range(place.sizes[dim])
        ]
    first = place.offsets[num_leading]
    for index, tensor in pending:
        yield index, (range(first, first + tensor.shape[0]), tensor)


def _row(tensor: StoredTensor, number: int) -> StoredTensor:
    """Returns a row of dimension 0, without that dimension."""
    row = tensor.cut(range(number, number + 1))
    return replace(row, shape=row.shape[1:])


def open_torch_dist(folder: Path) -> TorchDist:
    """Lists the tensors of a checkpoint.

    Args:
        folder: The folder with its files, or the one above it, which names it.

    Raises:
        CheckpointError: It is not whole, of another format, or holds more than tensors.
    """
    folder = _newest(folder)
    try:
        backend = json.loads((folder / METADATA_JSON).read_text(encoding="utf-8"))
        name = backend["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(
            f"{folder} is no whole checkpoint of Megatron's: {METADATA_JSON}, which is written "
            f"last, cannot be read ({error}). {_AGAIN}"
        ) from error
    if name != "torch_dist":
        raise CheckpointError(
            f"{folder} is of format {name!r}; only torch_dist is read. Load it in Megatron and "
            "save it with --ckpt-format torch_dist."
        )
    found = read_places(folder)
    return TorchDist(
        folder,
        shapes={key: shape for key, (shape, _) in found.items()},
        _places={key: places for key, (_, places) in found.items()},
    )


def _newest(folder: Path) -> Path:
    tracker = folder / MEGATRON_TRACKER
    if not tracker.is_file():
        return folder
    name = tracker.read_text(encoding="utf-8", errors="replace").strip()
    newest = folder / (f"iter_{int(name):07d}" if name.isdecimal() else name)
    if not (name == "release" or name.isdecimal()) or not newest.is_dir():
        raise CheckpointError(
            f"{tracker} names {name!r}, but {newest} is no folder of this checkpoint. Name one of "
            "the folders beside it."
        )
    return newest


_AGAIN = "Copy the checkpoint again from its source, or save it again with Megatron."
