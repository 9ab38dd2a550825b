"""Reads the ``.metadata`` of a torch_dist checkpoint, a pickle, without running what is in it.

Only the names that torch and Megatron write are let in, and even these stand for records that do
nothing. What the places it tells of hold is found in stored.py.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ds_moe_ep.checkpoint.files import MEGATRON_METADATA
from ds_moe_ep.checkpoint.manifest import is_file_name
from ds_moe_ep.errors import CheckpointError

__all__ = ["Place", "read_places"]


@dataclass(frozen=True)
class Place:
    """Where a part of a tensor lies.

    Attributes:
        offsets: Where the part begins in the tensor.
        sizes: Its shape.
        path: The file.
        start: Where its bytes begin in the file, as `torch.save` wrote them.
        num_bytes: How many there are.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    path: Path
    start: int
    num_bytes: int


class _Record:
    """Stands for an object of torch's: it keeps what it is given, and does nothing."""

    def __new__(cls, *given: Any) -> _Record:
        record = super().__new__(cls)
        record.given = given
        return record

    def __init__(self, *given: Any) -> None:
        self.given: tuple[Any, ...]

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


class _MemoryFormat(_Record):
    pass


class _ItemType(_Record):
    pass


class _Metadata(_Record):
    state_dict_metadata: Any
    storage_data: Any


class _Tensor(_Record):
    size: Any
    chunks: Any


class _Chunk(_Record):
    offsets: Any
    sizes: Any


class _Index(_Record):
    fqn: Any
    offset: Any = None


class _Storage(_Record):
    relative_path: Any
    offset: Any
    length: Any


def _shape(sizes: Any = ()) -> tuple[Any, ...]:
    return tuple(sizes)


_MEMBERS: dict[type[_Record], tuple[str, ...]] = {
    _MemoryFormat: ("TORCH_CONTIGUOUS_FORMAT", "TORCH_CHANNELS_LAST", "TORCH_PRESERVE_FORMAT"),
    _ItemType: ("TENSOR", "SHARD", "BYTE_IO"),
}


def _member(of: Any = None, name: Any = None, *more: Any) -> _Record:
    """Stands for `getattr`, by which some Pythons, such as 3.11.2, pickle a member of an enum.

    Megatron calls the real one, so it takes no more than the members that there are.
    """
    if more or not any(of is enum and name in names for enum, names in _MEMBERS.items()):
        raise CheckpointError("it asks for builtins.getattr, which can run code")
    return _Record(name)


_TORCH = "torch.distributed.checkpoint"
_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    (f"{_TORCH}.metadata", "Metadata"): _Metadata,
    (f"{_TORCH}.metadata", "TensorStorageMetadata"): _Tensor,
    (f"{_TORCH}.metadata", "ChunkStorageMetadata"): _Chunk,
    (f"{_TORCH}.metadata", "MetadataIndex"): _Index,
    (f"{_TORCH}.filesystem", "_StorageInfo"): _Storage,
    (f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING"): _MemoryFormat,
    (f"{_TORCH}.planner", "WriteItemType"): _ItemType,
    ("builtins", "getattr"): _member,
    ("torch", "Size"): _shape,
    ("torch.serialization", "_get_layout"): _Record,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "PosixPath"): _Record,
    ("pathlib._local", "PosixPath"): _Record,
}
# What else is in a file, such as the plans by which Megatron has saved, is of no use here. Names
# are listed one by one: what is let in here Megatron then unpickles with nothing in its way.
_OF_NO_USE = {
    (f"{_TORCH}.metadata", "BytesStorageMetadata"),
    (f"{_TORCH}.metadata", "StorageMeta"),
    (f"{_TORCH}.metadata", "TensorProperties"),
    (f"{_TORCH}.filesystem", "_StoragePrefix"),
    (f"{_TORCH}.planner", "BytesIOWriteData"),
    (f"{_TORCH}.planner", "SavePlan"),
    (f"{_TORCH}.planner", "TensorWriteData"),
    (f"{_TORCH}.planner", "WriteItem"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"),
}
_NAME_OF_DTYPE = re.compile(r"bool|b?float\d+(_\w+)?|u?int\d+|complex\d+")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        # Of a dotted name pickle takes one attribute after the other, from any module that the
        # first one imports. No name below has a dot.
        if known := _KNOWN.get((module, name)):
            return known
        if (module, name) in _OF_NO_USE:
            return _Record
        if module == "torch" and _NAME_OF_DTYPE.fullmatch(name):
            return name  # each tensor in the files tells its own
        raise CheckpointError(f"it asks for {module}.{name}, which can run code")


def read_places(folder: Path) -> dict[str, tuple[tuple[int, ...], list[Place]]]:
    """Reads which tensors a checkpoint has.

    Args:
        folder: The folder with ``.metadata``.

    Returns:
        The shape of each tensor and the places of its parts, by name. Objects are left out.

    Raises:
        CheckpointError: It cannot be read, is corrupt, or holds anything but what torch writes.
    """
    path = folder / MEGATRON_METADATA
    try:
        with path.open("rb") as file:
            content = _Unpickler(file).load()
        return _places(folder, content)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path} holds more than a list of tensors: {error}. None was run, and nothing of the "
            f"checkpoint was used. {_AGAIN}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}. {_AGAIN}") from error
    except Exception as error:  # what nobody vouches for can break its readers anyhow
        raise CheckpointError(f"{path} is corrupt ({type(error).__name__}). {_AGAIN}") from error


def _places(folder: Path, content: Any) -> dict[str, tuple[tuple[int, ...], list[Place]]]:
    stored = {
        (index.fqn, index.offset): (info.relative_path, info.offset, info.length)
        for index, info in content.storage_data.items()
    }
    found = {}
    for key, tensor in content.state_dict_metadata.items():
        if not isinstance(tensor, _Tensor):
            continue
        places = []
        for chunk in tensor.chunks:
            name, start, num_bytes = stored[key, chunk.offsets]
            if not is_file_name(name):
                raise CheckpointError(f"it names a file outside of its folder, {name!r}")
            sizes = _sizes(chunk.sizes)
            num_dims = {len(tensor.size), len(chunk.offsets), len(sizes)}
            if len(num_dims) > 1 or not math.prod(sizes):
                raise ValueError(f"{key}: a part of {sizes} in {tensor.size}")
            place = (folder / name, *_sizes((start, num_bytes)))
            places.append(Place(_sizes(chunk.offsets), sizes, *place))
        found[key] = _sizes(tensor.size), places
    return found


def _sizes(numbers: Any) -> tuple[int, ...]:
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"not sizes: {numbers!r}")
    return tuple(numbers)


_AGAIN = "Copy the checkpoint again from its source, or save it again with Megatron."
