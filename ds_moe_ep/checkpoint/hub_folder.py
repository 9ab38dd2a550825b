"""A Hugging Face directory as a whole: how its weight files are laid out, and what is beside them.

The tensors in its files are found in files.py; nothing is written here.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from ds_moe_ep.checkpoint.files import PICKLED_INDEX, CheckpointFiles
from ds_moe_ep.checkpoint.header import read_header
from ds_moe_ep.checkpoint.layout import PlannedFile, Tensors, copied_file, new_layout
from ds_moe_ep.checkpoint.manifest import (
    INDEX_JSON,
    MANIFEST_JSON,
    MODEL_SAFETENSORS,
    SourceFile,
    SourceSection,
    is_file_name,
)

__all__ = ["beside_the_weights", "describe_layout", "folder_name"]

# Configs, tokenizers, chat templates, licences.
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".tiktoken", ".txt", ".md")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_CODE_SUFFIX = ".py"


def beside_the_weights(
    folder: Path, files: CheckpointFiles, *, with_code: bool = False
) -> tuple[list[PlannedFile], tuple[str, ...]]:
    """Plans the copies of what belongs to a model, and names what is left out.

    Args:
        folder: Model directory, or an expert-sharded checkpoint.
        files: Its weights, which are not among the copies.
        with_code: Whether the model's own code is copied.
    """
    weights = {piece.path.name for pieces in files.tensors.values() for piece in pieces}
    if files.is_pickled:
        weights.add(PICKLED_INDEX)
    elif files.manifest is not None:
        weights.add(MANIFEST_JSON)
    elif _read_index(files) is not None:
        weights.add(INDEX_JSON)
    suffixes = (*_COPIED_SUFFIXES, _CODE_SUFFIX) if with_code else _COPIED_SUFFIXES
    copied, left_out = [], []
    for path in sorted(folder.iterdir()):
        if path.name in weights or path.name.startswith("."):
            continue
        if path.is_file() and _belongs_to_a_model(path.name, suffixes):
            copied.append(copied_file(path))
        else:
            left_out.append(path.name)
    return copied, tuple(left_out)


def describe_layout(files: CheckpointFiles) -> SourceSection:
    """Describes weight files as a manifest does: their tensors are in the order of their bytes.

    Pickled ones are described as the safetensors that are to be made of them.
    """
    name = folder_name(files.folder)
    if files.is_pickled:
        return new_layout(name, _by_file(files))
    index = _read_index(files)
    if index is not None:
        del index["weight_map"]
    return SourceSection(name=name, files=_stored(files), index=index)


def folder_name(folder: Path) -> str:
    """Returns the name of a folder for a manifest: bytes of it that are no text are escaped."""
    return os.fsencode(folder.resolve().name).decode(errors="backslashreplace")


def _stored(files: CheckpointFiles) -> dict[str, SourceFile]:
    layouts = {}
    for path in _paths(files):
        metadata, tensors = read_header(path)
        # A tensor that is in two files belongs to the one it is read from.
        own = [key for key in tensors if files.tensors[key][0].path == path]
        layouts[path.name] = SourceFile(metadata=metadata, tensors=own)
    return layouts


def _by_file(files: CheckpointFiles) -> list[Tensors]:
    return [
        {key: pieces for key, pieces in files.tensors.items() if pieces[0].path == path}
        for path in _paths(files)
    ]


def _paths(files: CheckpointFiles) -> list[Path]:
    return list(dict.fromkeys(piece.path for (piece,) in files.tensors.values()))


def _belongs_to_a_model(name: str, suffixes: tuple[str, ...]) -> bool:
    if not is_file_name(name) or name == MANIFEST_JSON or name.endswith(".index.json"):
        return False
    return name.endswith(suffixes) or name.startswith(_COPIED_NAMES)


def _read_index(files: CheckpointFiles) -> dict[str, object] | None:
    """Returns the index of a folder's weights; None if it has none, or one of other files.

    Where there is a single file it is what is read, whatever an index beside it says.
    """
    try:
        index = json.loads((files.folder / INDEX_JSON).read_text(encoding="utf-8"))
        named = set(index["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    is_single = (files.folder / MODEL_SAFETENSORS).is_file()
    return None if is_single and named != {MODEL_SAFETENSORS} else index
