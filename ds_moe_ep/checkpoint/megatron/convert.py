"""Converts Hugging Face directories to Megatron checkpoints in torch_dist format, and back.

It decides what goes where; a tensor is held in memory in parts, when it is written. Megatron itself
is not needed, and the number of ranks that are to load a checkpoint is not in it.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from ds_moe_ep.checkpoint.convert import MAX_DENSE_BYTES, Conversion, compare_files
from ds_moe_ep.checkpoint.files import MEGATRON_METADATA, MEGATRON_TRACKER, CheckpointFiles
from ds_moe_ep.checkpoint.header import StoredTensor
from ds_moe_ep.checkpoint.hub_folder import beside_the_weights, describe_layout
from ds_moe_ep.checkpoint.layout import PlannedFile, hugging_face_files, model_files
from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config
from ds_moe_ep.checkpoint.manifest import RECORD_JSON, FileEntry, SourceFile, SourceSection
from ds_moe_ep.checkpoint.mapping import rows_of
from ds_moe_ep.checkpoint.megatron.names import (
    MegatronTensor,
    TargetSpec,
    check_convertible,
    extra_states,
    megatron_tensors,
    possible_layouts,
)
from ds_moe_ep.checkpoint.megatron.record import Record, read_record
from ds_moe_ep.checkpoint.megatron.stored import TorchDist, open_torch_dist
from ds_moe_ep.checkpoint.megatron.torch_dist import (
    MAX_CHUNK_BYTES,
    Chunk,
    chunks_of,
    torch_dist_files,
)
from ds_moe_ep.checkpoint.source import Source, open_source
from ds_moe_ep.checkpoint.writer import ShowProgress, Summary, silently, write_folder
from ds_moe_ep.errors import CheckpointError, some
from ds_moe_ep.model_spec import ModelSpec, read_model_spec

__all__ = ["from_megatron", "to_megatron", "verify_megatron"]

_CONFIG_JSON = "config.json"
_RELEASE = "release"  # as Megatron calls a checkpoint that belongs to no step of a training
_OF_THE_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_OF_THE_MODEL = ("embedding.", "decoder.", "output_layer.")  # and not of the optimizer
_Tensors = Mapping[str, tuple[StoredTensor, ...]]


def to_megatron(
    source: Path,
    folder: Path,
    target_spec: TargetSpec,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    max_chunk_bytes: int = MAX_CHUNK_BYTES,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes a checkpoint that Megatron loads at any expert-parallel size.

    Args:
        source: Hugging Face model directory, or an expert-sharded checkpoint.
        folder: What to write.
        target_spec: Which layers it is for, Megatron's own or those of Transformer Engine.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        trust_remote_code: Whether the model's own code may be run, and is copied.
        max_chunk_bytes: Largest part of a tensor that each of the writing threads holds in memory.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: transformers cannot build the model.
        ConfigError: Megatron would not compute what Hugging Face does, or does not know the family.
        CheckpointError: The source is not whole or not what its config says, or `folder` cannot be
            written.
    """
    opened = open_source(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    spec, config = _read_config(source)
    opened.find_experts()
    layout = next(x for x in possible_layouts(spec) if x.target_spec == target_spec)
    tensors = megatron_tensors(spec, config, layout)
    left_out = _left_out(opened.files, tensors)
    chunks = _chunks_by_file(opened.files.tensors, tensors, max_chunk_bytes)
    weights, small = torch_dist_files(chunks, extra_states(tensors, layout))
    others, not_copied = _beside(source, opened.files, with_code=trust_remote_code)
    section = _section(opened.files, left_out)

    def record(entries: Mapping[str, FileEntry]) -> str:
        files = {name: entries[name] for name in sorted(entries)}
        return Record(target_spec=target_spec, source=section, files=files).to_json()

    write_folder(
        folder,
        _in_release(weights),
        [*_in_release(small), PlannedFile(MEGATRON_TRACKER, _RELEASE.encode()), *others],
        summary=Summary(RECORD_JSON, record),
        show_progress=show_progress,
    )
    if left_out:
        not_copied += (f"{len(left_out)} tensors that transformers ignores ({some(left_out)})",)
    return Conversion.of(folder, not_copied)


def from_megatron(
    source: Path,
    folder: Path,
    config_from: Path | None = None,
    *,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes a Hugging Face directory from a Megatron checkpoint.

    What `to_megatron` has written comes back as the very same files.

    Args:
        source: The folder that Megatron's --load names, or the checkpoint in it.
        folder: What to write.
        config_from: Hugging Face directory whose config.json describes the model, and whose
            tokenizer and other small files are to be beside it; by default `source`.
        show_progress: Opens the progress bar.

    Raises:
        ConfigError: The config is not of a model that can be converted.
        CheckpointError: The source is not whole or not of the config, or `folder` cannot be
            written.
    """
    beside = source if config_from is None else config_from
    if config_from is None and not (source / _CONFIG_JSON).is_file():
        raise CheckpointError(
            f"{source} has no {_CONFIG_JSON}: Megatron does not save what Hugging Face needs. Name "
            "the Hugging Face directory that it was made from: --config-from DIR."
        )
    spec, config = _read_config(beside)
    stored = open_torch_dist(source)
    found = _hugging_face_tensors(stored, _tensors_of(stored, spec, config))
    model = build_on_meta(read_model_config(beside), torch.float32)
    Source(CheckpointFiles(stored.folder, found), model).check_tensors()
    record = read_record(source)
    if record is not None and _names(record.source) == found.keys():
        weights = hugging_face_files(record.source, found)
    else:
        weights = model_files(found, max_file_bytes=MAX_DENSE_BYTES)
    others, not_copied = _beside(beside, CheckpointFiles(beside, {}))
    # Of the checkpoint itself, and of others beside it, nothing was to be copied.
    not_copied = tuple(name for name in not_copied if not _is_checkpoint(source / name))
    write_folder(folder, weights, others, show_progress=show_progress)
    return Conversion.of(folder, not_copied if config_from is None else ())


def verify_megatron(folder: Path, *, show_progress: ShowProgress = silently) -> Conversion:
    """Reads every byte of what `to_megatron` has written and compares it with its record.

    Raises:
        CheckpointError: It is not whole, or Megatron itself wrote it and so there is no record.
    """
    record = read_record(folder)
    if record is None:
        above = folder.absolute().parent
        way_out = (
            f"Name the folder above, {above}."
            if (above / RECORD_JSON).is_file()
            else "Megatron wrote it, or it was copied in part."
        )
        raise CheckpointError(
            f"{folder} has no {RECORD_JSON}, so there is nothing to compare it with. {way_out}"
        )
    return compare_files(folder, record.files, RECORD_JSON, show_progress=show_progress)


def _read_config(folder: Path) -> tuple[ModelSpec, dict[str, Any]]:
    """Reads what a model is, and refuses it where Megatron computes something else."""
    spec = read_model_spec(folder)
    config = json.loads((folder / _CONFIG_JSON).read_text(encoding="utf-8"))
    check_convertible(spec, config)
    return spec, config


def _beside(
    folder: Path, files: CheckpointFiles, *, with_code: bool = False
) -> tuple[list[PlannedFile], tuple[str, ...]]:
    """Plans copies as `beside_the_weights` does, but of none that tells of a Megatron checkpoint.

    The weights that one there tells of are not those that are written.
    """
    copied, left_out = beside_the_weights(folder, files, with_code=with_code)
    return [f for f in copied if f.name not in (MEGATRON_TRACKER, RECORD_JSON)], left_out


def _is_checkpoint(folder: Path) -> bool:
    return (folder / MEGATRON_METADATA).is_file()


def _left_out(files: CheckpointFiles, tensors: Sequence[MegatronTensor]) -> list[str]:
    """Returns the source's tensors that are not the model's; refuses a source that lacks some."""
    wanted = {part.tensor for tensor in tensors for part in tensor.parts}
    if lacking := sorted(wanted - files.tensors.keys()):
        raise CheckpointError(
            f"{files.folder}: {len(lacking)} tensors are not there by the names that they have on "
            f"the hub: {some(lacking)}. Load the model with transformers, save it, and convert "
            "that."
        )
    return sorted(files.tensors.keys() - wanted)


def _chunks_by_file(
    stored: _Tensors, tensors: Sequence[MegatronTensor], max_chunk_bytes: int
) -> list[Sequence[Chunk]]:
    """Spreads tensors over files: one for each layer, and one for what is in none."""
    files: dict[str, list[Chunk]] = defaultdict(list)
    for tensor in tensors:
        pieces = [
            piece for part in tensor.parts for piece in rows_of(stored[part.tensor], part.rows)
        ]
        # A layer's tensors are made of tensors of that layer only.
        prefix, number, *_ = tensor.parts[0].tensor.removeprefix("model.").split(".")
        name = number if prefix == "layers" else ""
        files[name] += chunks_of(tensor.key, tensor.index, tensor.leading, pieces, max_chunk_bytes)
    return list(files.values())


def _in_release(files: Sequence[PlannedFile]) -> list[PlannedFile]:
    return [replace(file, name=f"{_RELEASE}/{file.name}") for file in files]


def _section(files: CheckpointFiles, left_out: Sequence[str]) -> SourceSection:
    """Describes the source's files without the tensors that are left out."""
    section = describe_layout(files) if files.manifest is None else files.manifest.source
    kept = {
        name: SourceFile(
            metadata=file.metadata,
            tensors=[key for key in file.tensors if key not in set(left_out)],
        )
        for name, file in section.files.items()
    }
    return section.model_copy(update={"files": kept})


def _names(section: SourceSection) -> set[str]:
    return {key for file in section.files.values() for key in file.tensors}


def _tensors_of(
    stored: TorchDist, spec: ModelSpec, config: Mapping[str, Any]
) -> list[MegatronTensor]:
    """Returns the model's tensors by the names that a checkpoint has, of all it might have."""
    fewest: list[str] | None = None
    for layout in possible_layouts(spec):
        tensors = megatron_tensors(spec, config, layout)
        lacking = sorted({tensor.key for tensor in tensors} - stored.shapes.keys())
        if not lacking:
            _check_rows(stored, tensors)
            return tensors
        fewest = lacking if fewest is None else min(fewest, lacking, key=len)
    lacking = cast(list[str], fewest)
    raise CheckpointError(
        f"{stored.folder} is not of the {spec.model_type} model that config.json describes: "
        f"{len(lacking)} of its tensors are missing: {some(lacking)}."
    )


def _check_rows(stored: TorchDist, tensors: Sequence[MegatronTensor]) -> None:
    """Refuses weights that the model has not, or with other rows than the config says."""
    left_over = stored.shapes.keys() - {tensor.key for tensor in tensors}
    if left_over := {key for key in left_over if key.startswith(_OF_THE_MODEL)}:
        raise CheckpointError(
            f"{stored.folder} has {len(left_over)} tensors that the model of config.json has not: "
            f"{some(sorted(left_over))}. The weights are not those of this config."
        )
    for tensor in tensors:
        shape, num_leading = stored.shapes[tensor.key], len(tensor.leading)
        num_rows = shape[num_leading] if len(shape) > num_leading else 0
        is_padded = tensor.key in _OF_THE_VOCABULARY and num_rows > tensor.num_rows
        if shape[:num_leading] != tensor.leading or (num_rows != tensor.num_rows and not is_padded):
            raise CheckpointError(
                f"{stored.folder}: {tensor.key} is {[*shape]}, config.json says "
                f"{[*tensor.leading, tensor.num_rows]} and so on. The weights are not those of "
                "this config."
            )


def _hugging_face_tensors(
    stored: TorchDist, tensors: Sequence[MegatronTensor]
) -> dict[str, tuple[StoredTensor, ...]]:
    """Returns where the rows of each Hugging Face tensor lie."""
    places: dict[str, list[tuple[int, MegatronTensor, range]]] = defaultdict(list)
    for tensor in tensors:
        begin = 0
        for part in tensor.parts:
            rows = range(begin, begin + len(part.rows))
            places[part.tensor].append((part.rows.start, tensor, rows))
            begin = rows.stop
    found = {}
    for name, parts in places.items():
        parts.sort(key=lambda part: part[0])
        pieces = [p for _, of, rows in parts for p in stored.rows(of.key, of.index, rows)]
        if len(kinds := {(piece.dtype, piece.shape[1:]) for piece in pieces}) > 1:
            raise CheckpointError(
                f"{stored.folder}: {name} would have rows of types and shapes {sorted(kinds)}. "
                "The weights are not those of one model."
            )
        found[name] = tuple(pieces)
    return found
