"""Converts a Hugging Face directory to an expert-sharded checkpoint and back, and checks one.

Tensors are copied bit by bit and never held: what is decided here is which bytes go where.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds_moe_ep.checkpoint.files import CheckpointFiles, open_checkpoint, open_expert_sharded
from ds_moe_ep.checkpoint.header import Piece, joined_shape, read_header
from ds_moe_ep.checkpoint.layout import (
    PlannedFile,
    Tensors,
    check_experts,
    copied_file,
    hugging_face_files,
    safetensors_file,
    shard_tensors,
)
from ds_moe_ep.checkpoint.manifest import (
    INDEX_JSON,
    MANIFEST_JSON,
    FileEntry,
    Manifest,
    PlanSection,
    SourceFile,
    SourceSection,
    TensorEntry,
    is_file_name,
    read_manifest,
)
from ds_moe_ep.checkpoint.writer import ShowProgress, hash_files, silently, write_folder
from ds_moe_ep.errors import CheckpointError, PlanError
from ds_moe_ep.plan import ParallelPlan, valid_ep_sizes

if TYPE_CHECKING:
    from ds_moe_ep.checkpoint.mapping import ExpertTensor

__all__ = [
    "MAX_DENSE_BYTES",
    "Conversion",
    "beside_the_weights",
    "default_ep_size",
    "describe",
    "to_expert_sharded",
    "to_hugging_face",
    "verify",
    "write_expert_sharded",
]

MAX_DENSE_BYTES = 5_000_000_000
"""Size at which another file of dense weights begins, as on the hub."""
_MAX_EXPERT_FILES = 64  # unless an ep_size asks for more
# What stands beside the weights: configs, tokenizers, chat templates, licences; never code.
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote or a check has read.

    Attributes:
        folder: The folder.
        num_files: Files in it.
        num_bytes: Their bytes.
        not_copied: Names in the source that are neither weights nor known to belong to a model.
    """

    folder: Path
    num_files: int
    num_bytes: int
    not_copied: tuple[str, ...] = ()


def to_expert_sharded(
    source: Path,
    folder: Path,
    ep_size: int | None = None,
    *,
    max_dense_bytes: int = MAX_DENSE_BYTES,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes an expert-sharded checkpoint: dense weights, and a file for each rank's experts.

    Args:
        source: Hugging Face model directory with safetensors.
        folder: What to write.
        ep_size: Number of expert files; by default the largest up to 64 that divides the experts.
            The checkpoint loads at any other that does.
        max_dense_bytes: Size at which another dense file begins.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: The model has no experts, or ep_size does not divide them.
        PlanError: ep_size is below 1.
        CheckpointError: The source is not whole, or `folder` cannot be written.
    """
    plan, files, of_experts = _experts_of(source, ep_size)
    others, not_copied = beside_the_weights(source, files)
    write_expert_sharded(
        folder,
        shard_tensors(files.tensors, of_experts, plan.ep_size, max_dense_bytes=max_dense_bytes),
        others,
        plan=plan,
        source=SourceSection(
            name=source.resolve().name,
            files=_source_files(files),
            index=_index_without_map(source / INDEX_JSON),
        ),
        show_progress=show_progress,
    )
    return describe(folder, not_copied)


def write_expert_sharded(
    folder: Path,
    shards: Mapping[str, Tensors],
    others: Sequence[PlannedFile],
    *,
    plan: ParallelPlan,
    source: SourceSection,
    show_progress: ShowProgress = silently,
) -> None:
    """Writes the files of an expert-sharded checkpoint, the manifest last.

    Args:
        folder: What to write.
        shards: The tensors of each weight file, by its name.
        others: The other files.
        plan: What the files are for.
        source: What they are made from.
        show_progress: Opens the progress bar.

    Raises:
        CheckpointError: See `write_folder`.
    """
    weights = [
        safetensors_file(name, {"format": "pt"}, tensors) for name, tensors in shards.items()
    ]

    def manifest(entries: dict[str, FileEntry]) -> PlannedFile:
        content = Manifest(
            source=source,
            plan=PlanSection(**asdict(plan)),
            files={name: entries[name] for name in sorted(entries)},
            tensors=_tensor_entries(shards),
        )
        return PlannedFile(MANIFEST_JSON, content.to_json().encode())

    write_folder(folder, weights, others, summary=manifest, show_progress=show_progress)


def to_hugging_face(
    source: Path, folder: Path, *, show_progress: ShowProgress = silently
) -> Conversion:
    """Writes the Hugging Face directory that an expert-sharded checkpoint was made from.

    Args:
        source: The checkpoint.
        folder: What to write.
        show_progress: Opens the progress bar.

    Raises:
        CheckpointError: The checkpoint is not whole, or `folder` cannot be written.
    """
    manifest = read_manifest(source)
    if not manifest.source.files:
        raise CheckpointError(
            f"{source} was upcycled from a dense model, so there is no Hugging Face directory to "
            "go back to. launch/infer.py runs it as it is; where transformers has an MoE family of "
            "the kind, convert the dense model again: --to hf --upcycle-experts E --top-k K."
        )
    files = open_expert_sharded(source, manifest)
    weights = hugging_face_files(manifest, files.tensors)
    held = {name for entry in manifest.tensors.values() for name in entry.files}
    others = [copied_file(source / name) for name in manifest.files if name not in held]
    write_folder(folder, weights, others, show_progress=show_progress)
    return describe(folder)


def verify(folder: Path, *, show_progress: ShowProgress = silently) -> Conversion:
    """Reads every byte of an expert-sharded checkpoint and compares it with the manifest.

    Raises:
        CheckpointError: It is not whole; names the files at fault.
    """
    manifest = read_manifest(folder)
    open_expert_sharded(folder, manifest)
    total = sum(file.num_bytes for file in manifest.files.values())
    corrupt = []
    with show_progress(total) as progress:
        try:
            for path, sha256 in hash_files([folder / name for name in manifest.files], progress):
                if sha256 != manifest.files[path.name].sha256:
                    corrupt.append(path.name)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}.") from error
    if corrupt:
        raise CheckpointError(
            f"{folder}: {len(corrupt)} of {len(manifest.files)} files are corrupt (their sha256 is "
            f"not that in {MANIFEST_JSON}): {', '.join(sorted(corrupt))}. Copy them again from "
            "their source, or convert the model again."
        )
    return Conversion(folder, len(manifest.files) + 1, total)


def _experts_of(
    source: Path, ep_size: int | None
) -> tuple[ParallelPlan, CheckpointFiles, dict[str, ExpertTensor]]:
    """Finds which tensors of a model directory hold experts, and how to spread these."""
    # Seconds, which going back and checking need not wait for.
    import torch

    from ds_moe_ep.adapter.replace import shard_experts
    from ds_moe_ep.checkpoint.load import build_on_meta, read_model_config
    from ds_moe_ep.checkpoint.mapping import expert_tensors

    if ep_size is not None and ep_size < 1:
        raise PlanError(f"ep_size={ep_size}: at least 1 is needed.")
    config = read_model_config(source)
    files = open_checkpoint(source)
    if files.manifest is not None:
        raise CheckpointError(
            f"{source} is an expert-sharded checkpoint already, and it loads at any ep_size. For "
            f"other files first go back: ds-moe-ep convert {source} DST --to hf."
        )
    with torch.device("meta"):  # buffers too, which are only needed to run the model
        model = build_on_meta(config, torch.float32)
    layers = shard_experts(model, ep_size or 1, ep_rank=0)
    if ep_size is None:
        ep_size = default_ep_size(math.gcd(*(layer.num_experts for layer in layers)))
    of_experts = expert_tensors(model, files, layers)
    check_experts(of_experts, (layer.name for layer in layers))
    return ParallelPlan(ep_size), files, of_experts


def default_ep_size(num_experts: int) -> int:
    """Returns into how many files experts go where nobody says: up to 64, equally many in each."""
    return max(valid_ep_sizes(num_experts, at_most=_MAX_EXPERT_FILES))


def beside_the_weights(
    source: Path, files: CheckpointFiles
) -> tuple[list[PlannedFile], tuple[str, ...]]:
    """Plans the copies of what belongs to a model, and names what is left out.

    Args:
        source: Model directory.
        files: Its weights, which are not among the copies.
    """
    converted = {piece.path.name for (piece,) in files.tensors.values()} | {INDEX_JSON}
    copied, left_out = [], []
    for path in sorted(source.iterdir()):
        if path.name in converted or path.name.startswith("."):
            continue
        if path.is_file() and _belongs_to_a_model(path.name):
            copied.append(copied_file(path))
        else:
            left_out.append(path.name)
    return copied, tuple(left_out)


def _belongs_to_a_model(name: str) -> bool:
    if not is_file_name(name) or name == MANIFEST_JSON or name.endswith(".index.json"):
        return False
    return name.endswith(_COPIED_SUFFIXES) or name.startswith(_COPIED_NAMES)


def _tensor_entries(shards: Mapping[str, Tensors]) -> dict[str, TensorEntry]:
    pieces_of: dict[str, list[Piece]] = defaultdict(list)
    held_in = defaultdict(list)
    for name, tensors in shards.items():
        for key, pieces in tensors.items():
            pieces_of[key] += pieces
            held_in[key].append(name)
    return {
        key: TensorEntry(
            dtype=pieces[0].dtype, shape=list(joined_shape(pieces)), files=held_in[key]
        )
        for key, pieces in pieces_of.items()
    }


def _source_files(files: CheckpointFiles) -> dict[str, SourceFile]:
    layouts = {}
    for path in _unique(piece.path for (piece,) in files.tensors.values()):
        metadata, tensors = read_header(path)
        # A tensor that is in two files belongs to the one it is read from.
        own = [key for key in tensors if files.tensors[key][0].path == path]
        layouts[path.name] = SourceFile(metadata=metadata, tensors=own)
    return layouts


def _unique(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))


def _index_without_map(path: Path) -> dict[str, object] | None:
    if not path.is_file():
        return None
    index = json.loads(path.read_text(encoding="utf-8"))
    return {name: value for name, value in index.items() if name != "weight_map"}


def describe(folder: Path, not_copied: tuple[str, ...] = ()) -> Conversion:
    """Counts what a conversion wrote.

    Args:
        folder: What was written.
        not_copied: Names in the source that were left out.
    """
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Conversion(folder, len(sizes), sum(sizes), not_copied)
