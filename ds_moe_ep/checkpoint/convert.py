"""Converts a Hugging Face directory to an expert-sharded checkpoint and back, and checks one.

It also writes DeepSpeed's own format. Tensors are copied bit by bit: what is decided here is which
bytes go where.
"""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from ds_moe_ep.checkpoint.files import (
    has_safetensors,
    is_of_deepspeed,
    is_pickled,
    open_expert_sharded,
)
from ds_moe_ep.checkpoint.header import Piece, joined_shape
from ds_moe_ep.checkpoint.hub_folder import beside_the_weights, describe_layout
from ds_moe_ep.checkpoint.layout import (
    PlannedFile,
    Tensors,
    copied_file,
    hugging_face_files,
    safetensors_file,
    shard_tensors,
)
from ds_moe_ep.checkpoint.manifest import (
    MANIFEST_JSON,
    FileEntry,
    Manifest,
    PlanSection,
    SourceSection,
    TensorEntry,
    read_manifest,
)
from ds_moe_ep.checkpoint.streams import hash_files
from ds_moe_ep.checkpoint.writer import ShowProgress, Summary, silently, write_folder
from ds_moe_ep.errors import CheckpointError, PlanError
from ds_moe_ep.plan import ParallelPlan, valid_ep_sizes

__all__ = [
    "MAX_DENSE_BYTES",
    "Conversion",
    "choose_ep_size",
    "compare_files",
    "to_deepspeed",
    "to_expert_sharded",
    "to_hugging_face",
    "verify",
    "write_expert_sharded",
]

MAX_DENSE_BYTES = 5_000_000_000
"""Size at which another file of dense weights begins, as on the hub."""
_MAX_EXPERT_FILES = 64  # unless an ep_size asks for more


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

    @classmethod
    def of(cls, folder: Path, not_copied: tuple[str, ...] = ()) -> Conversion:
        """Counts what a conversion wrote.

        Args:
            folder: What was written.
            not_copied: Names in the source that were left out.
        """
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        return cls(folder, len(sizes), sum(sizes), not_copied)


def to_expert_sharded(
    source: Path,
    folder: Path,
    ep_size: int | None = None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    max_dense_bytes: int = MAX_DENSE_BYTES,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes an expert-sharded checkpoint: dense weights, and a file for each rank's experts.

    Args:
        source: Hugging Face model directory.
        folder: What to write.
        ep_size: Number of expert files; by default the largest up to 64 that divides the experts.
            The checkpoint loads at any other that does.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        trust_remote_code: Whether the model's own code may be run, and is copied.
        max_dense_bytes: Size at which another dense file begins.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: The model has no experts, or ep_size does not divide them.
        PlanError: ep_size is below 1.
        CheckpointError: The source is not whole or not what its config says, or `folder` cannot be
            written.
    """
    # Seconds, which going back and checking need not wait for.
    from ds_moe_ep.checkpoint.source import open_source

    opened = open_source(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if opened.files.manifest is not None:
        raise CheckpointError(
            f"{source} is an expert-sharded checkpoint already, and it loads at any ep_size. For "
            f"other files first go back: ds-moe-ep convert {shlex.quote(str(source))} DST "
            "--to hf."
        )
    ep_size = choose_ep_size(ep_size, math.gcd(*(layer.num_experts for layer in opened.layers)))
    of_experts = opened.find_experts(ep_size)
    others, not_copied = beside_the_weights(source, opened.files, with_code=trust_remote_code)
    write_expert_sharded(
        folder,
        shard_tensors(opened.files.tensors, of_experts, ep_size, max_dense_bytes=max_dense_bytes),
        others,
        plan=ParallelPlan(ep_size),
        source=describe_layout(opened.files),
        show_progress=show_progress,
    )
    return Conversion.of(folder, not_copied)


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

    def manifest(entries: Mapping[str, FileEntry]) -> str:
        content = Manifest(
            source=source,
            plan=PlanSection(**asdict(plan)),
            files={name: entries[name] for name in sorted(entries)},
            tensors=_tensor_entries(shards),
        )
        return content.to_json()

    summary = Summary(MANIFEST_JSON, manifest)
    write_folder(folder, weights, others, summary=summary, show_progress=show_progress)


def to_hugging_face(
    source: Path,
    folder: Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes a Hugging Face directory with safetensors.

    Args:
        source: An expert-sharded checkpoint, whose own source is written; or, if that is allowed, a
            Hugging Face directory with pickled weights.
        folder: What to write.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        trust_remote_code: Whether the own code of a model with pickled weights may be run, and is
            copied.
        show_progress: Opens the progress bar.

    Raises:
        CheckpointError: The source is not whole or not what its config says, or `folder` cannot be
            written.
    """
    if is_pickled(source):
        return _unpickle(source, folder, allow_pickle, trust_remote_code, show_progress)
    if is_of_deepspeed(source):
        raise CheckpointError(
            f"{source} is a checkpoint of DeepSpeed, which has other names and shapes than Hugging "
            "Face's files. Convert what it was made from."
        )
    if has_safetensors(source) and not (source / MANIFEST_JSON).is_file():
        raise CheckpointError(
            f"{source} is a Hugging Face directory with safetensors already: there is nothing to "
            "convert. Name an expert-sharded checkpoint, or one of Megatron's."
        )
    manifest = read_manifest(source)
    if not manifest.source.files:
        raise CheckpointError(
            f"{source} was upcycled from a dense model, so there is no Hugging Face directory to "
            "go back to. launch/infer.py runs it as it is; where transformers has an MoE family of "
            "the kind, convert the dense model again: --to hf --upcycle-experts E --top-k K."
        )
    files = open_expert_sharded(source, manifest)
    weights = hugging_face_files(manifest.source, files.tensors)
    held = {name for entry in manifest.tensors.values() for name in entry.files}
    others = [copied_file(source / name) for name in manifest.files if name not in held]
    write_folder(folder, weights, others, show_progress=show_progress)
    return Conversion.of(folder)


def to_deepspeed(
    source: Path,
    folder: Path,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Writes DeepSpeed's own MoE checkpoint, which it loads into the adapted model.

    An expert is held in memory when it is written, for one file all dense weights are.

    Args:
        source: Hugging Face model directory, or an expert-sharded checkpoint.
        folder: What to write.
        allow_pickle: Whether weights may be pickled ones; even then no code in them is run.
        trust_remote_code: Whether the model's own code may be run, and is copied.
        show_progress: Opens the progress bar.

    Raises:
        AdapterError: The model has no experts.
        CheckpointError: The source is not whole or not what its config says, or `folder` cannot be
            written.
    """
    from ds_moe_ep.checkpoint.deepspeed_layout import deepspeed_files
    from ds_moe_ep.checkpoint.source import open_source

    opened = open_source(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    of_experts = opened.find_experts()
    weights = deepspeed_files(opened.model, opened.files.tensors, opened.layers, of_experts)
    others, not_copied = beside_the_weights(source, opened.files, with_code=trust_remote_code)
    write_folder(folder, weights, others, show_progress=show_progress)
    return Conversion.of(folder, not_copied)


def verify(folder: Path, *, show_progress: ShowProgress = silently) -> Conversion:
    """Reads every byte of an expert-sharded checkpoint and compares it with the manifest.

    Raises:
        CheckpointError: It is not whole; names the files at fault.
    """
    manifest = read_manifest(folder)
    open_expert_sharded(folder, manifest)
    return compare_files(folder, manifest.files, MANIFEST_JSON, show_progress=show_progress)


def compare_files(
    folder: Path,
    files: Mapping[str, FileEntry],
    listed_in: str,
    *,
    show_progress: ShowProgress = silently,
) -> Conversion:
    """Reads every byte of files and compares their hashes.

    Args:
        folder: Where they are.
        files: Them, by their paths in the folder, with slashes.
        listed_in: Name of the file beside them that lists them.
        show_progress: Opens the progress bar.

    Raises:
        CheckpointError: Names the files that are corrupt or cannot be read.
    """
    total = sum(file.num_bytes for file in files.values())
    corrupt = []
    with show_progress(total) as progress:
        try:
            for path, sha256 in hash_files([folder / name for name in files], progress):
                name = path.relative_to(folder).as_posix()
                if sha256 != files[name].sha256:
                    corrupt.append(name)
        except OSError as error:
            raise CheckpointError(f"{folder} cannot be read: {error}.") from error
    if corrupt:
        raise CheckpointError(
            f"{folder}: {len(corrupt)} of {len(files)} files are corrupt (their sha256 is "
            f"not that in {listed_in}): {', '.join(sorted(corrupt))}. Copy them again from "
            "their source, or convert the model again."
        )
    return Conversion(folder, len(files) + 1, total)


def _unpickle(
    source: Path,
    folder: Path,
    allow_pickle: bool,
    trust_remote_code: bool,
    show_progress: ShowProgress,
) -> Conversion:
    """Writes a Hugging Face directory anew, with safetensors instead of pickled weights."""
    from ds_moe_ep.checkpoint.source import open_source

    opened = open_source(source, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    opened.check_tensors()
    weights = hugging_face_files(describe_layout(opened.files), opened.files.tensors)
    others, not_copied = beside_the_weights(source, opened.files, with_code=trust_remote_code)
    write_folder(folder, weights, others, show_progress=show_progress)
    return Conversion.of(folder, not_copied)


def choose_ep_size(ep_size: int | None, num_experts: int) -> int:
    """Returns into how many files experts go: as asked, or up to 64, equally many in each.

    Raises:
        PlanError: ep_size is below 1.
    """
    if ep_size is None:
        return max(valid_ep_sizes(num_experts, at_most=_MAX_EXPERT_FILES))
    if ep_size < 1:
        raise PlanError(f"ep_size={ep_size}: at least 1 is needed.")
    return ep_size


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
