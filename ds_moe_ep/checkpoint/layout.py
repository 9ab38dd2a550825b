"""Which files a converted checkpoint consists of, and which bytes of the source make up each.

Nothing is read or written here: content.py copies the bytes, and calls what produces others.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ds_moe_ep.checkpoint.header import ByteRange, FileState, Piece, make_header
from ds_moe_ep.checkpoint.manifest import INDEX_JSON, SourceFile, SourceSection

if TYPE_CHECKING:  # it takes transformers to say which tensor is an expert's, but not to place it
    from ds_moe_ep.checkpoint.mapping import ExpertTensor

__all__ = [
    "PlannedFile",
    "ProducedBytes",
    "Tensors",
    "copied_file",
    "hugging_face_files",
    "model_files",
    "new_layout",
    "safetensors_file",
    "shard_tensors",
]

Tensors = Mapping[str, tuple[Piece, ...]]
"""Tensors by name, each with the pieces that follow each other in dimension 0."""


class ProducedBytes(ABC):
    """Part of a file that is computed when it is written, the same bytes every time."""

    @property
    @abstractmethod
    def source(self) -> ByteRange | None:
        """What they are computed from, if from a file."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """How many there are."""

    @abstractmethod
    def recipe(self) -> str:
        """Returns what changes when other bytes would be produced from the same source."""

    @abstractmethod
    def chunks(self) -> Iterator[bytes]:
        """Yields them, a few megabytes at a time."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: some bytes, then ranges of other files; or what a function makes of them.

    Attributes:
        name: Its path in the folder, with slashes.
        head: What it begins with.
        ranges: What is copied after that.
        make: Writes the file, in order, from the bytes of `ranges`; None if these are copied.
    """

    name: str
    head: bytes
    ranges: tuple[ByteRange | ProducedBytes, ...] = ()
    make: Callable[[IO[bytes]], None] | None = None

    @property
    def num_bytes(self) -> int:
        """Its size, or about that if a function makes it."""
        return len(self.head) + sum(part.num_bytes for part in self.ranges)


def safetensors_file(name: str, metadata: Mapping[str, str], tensors: Tensors) -> PlannedFile:
    """Plans a safetensors file whose tensors lie in the given order."""
    ranges = tuple(part for pieces in tensors.values() for piece in pieces for part in piece.parts)
    return PlannedFile(name, make_header(metadata, tensors.items()), ranges)


def copied_file(path: Path) -> PlannedFile:
    """Plans a copy of a file."""
    state = FileState.of(path)
    return PlannedFile(path.name, b"", (ByteRange(path, 0, state.num_bytes, state=state),))


def shard_tensors(
    tensors: Tensors,
    of_experts: Mapping[str, ExpertTensor],
    ep_size: int,
    *,
    max_dense_bytes: int,
) -> dict[str, Tensors]:
    """Spreads tensors over the files of an expert-sharded checkpoint.

    Args:
        tensors: All tensors of the source, in one piece each.
        of_experts: Which of them hold experts.
        ep_size: Number of expert files; it divides the experts of every layer.
        max_dense_bytes: Size at which another dense file begins.

    Returns:
        The tensors of each file, by its name, in the order in which they are to lie. A fused
        tensor has rows in every expert file.
    """
    dense = {key: pieces for key, pieces in tensors.items() if key not in of_experts}
    shards: list[dict[str, tuple[Piece, ...]]] = [{} for _ in range(ep_size)]
    for key, found in of_experts.items():
        (tensor,) = tensors[key]
        num_local = found.layer.num_experts // ep_size
        if found.expert is not None:
            shards[found.expert // num_local][key] = (tensor,)
            continue
        for ep_rank, shard in enumerate(shards):
            rows = range(ep_rank * num_local, (ep_rank + 1) * num_local)
            shard[key] = (tensor.cut(rows),)
    files = _numbered("dense", list(_split(dense, max_dense_bytes)))
    files |= _numbered("experts", shards, always=True)
    return {name: _aligned(held) for name, held in files.items()}


def hugging_face_files(source: SourceSection, tensors: Tensors) -> list[PlannedFile]:
    """Plans the weight files and the index of a Hugging Face directory.

    Args:
        source: Its layout.
        tensors: All of its tensors.
    """
    files = [
        safetensors_file(name, file.metadata, {key: tensors[key] for key in file.tensors})
        for name, file in source.files.items()
    ]
    if source.index is not None:
        weight_map = {key: name for name, file in source.files.items() for key in file.tensors}
        # The form in which transformers writes it.
        text = json.dumps(source.index | {"weight_map": weight_map}, indent=2, sort_keys=True)
        files.append(PlannedFile(INDEX_JSON, f"{text}\n".encode()))
    return files


def model_files(tensors: Tensors, *, max_file_bytes: int) -> list[PlannedFile]:
    """Plans the weight files of a new Hugging Face directory, and their index if there are several.

    Args:
        tensors: All tensors.
        max_file_bytes: Size at which another file begins.
    """
    groups = list(_split(tensors, max_file_bytes))
    return hugging_face_files(new_layout("", groups), tensors)


def new_layout(name: str, groups: Sequence[Tensors]) -> SourceSection:
    """Describes the weight files of a new Hugging Face directory.

    Args:
        name: Its name.
        groups: The tensors of each file.
    """
    files = {
        file: SourceFile(metadata={"format": "pt"}, tensors=list(_aligned(held)))
        for file, held in _numbered("model", groups).items()
    }
    size = sum(piece.num_bytes for held in groups for pieces in held.values() for piece in pieces)
    index = {"metadata": {"total_size": size}} if len(groups) > 1 else None
    return SourceSection(name=name, files=files, index=index)


def _split(tensors: Tensors, max_bytes: int) -> Iterator[Tensors]:
    """Yields groups of tensors, each as large as may be but at least one tensor."""
    group: dict[str, tuple[Piece, ...]] = {}
    size = 0
    for key, pieces in tensors.items():
        num_bytes = sum(piece.num_bytes for piece in pieces)
        if group and size + num_bytes > max_bytes:
            yield group
            group, size = {}, 0
        group[key] = pieces
        size += num_bytes
    if group:
        yield group


def _numbered(stem: str, groups: Sequence[Tensors], *, always: bool = False) -> dict[str, Tensors]:
    if len(groups) == 1 and not always:
        return {f"{stem}.safetensors": groups[0]}
    return {
        f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors": group
        for number, group in enumerate(groups, start=1)
    }


def _aligned(tensors: Tensors) -> Tensors:
    """Orders tensors so that each begins at a multiple of its element's size.

    safetensors cannot read them otherwise. Among equal sizes the source is read in order; tensors
    without elements come first, where every size is right.
    """

    def order(item: tuple[str, tuple[Piece, ...]]) -> tuple[bool, int, Path, int]:
        first = item[1][0]
        return first.num_bytes > 0, -first.element_bytes, first.path, first.start

    return dict(sorted(tensors.items(), key=order))
