"""Finds out before a job runs whether the files of an expert-sharded checkpoint are as written.

Hugging Face's files have no checksums to compare with: of them only header and size are checked.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ds_moe_ep.checkpoint.manifest import MANIFEST_JSON, read_manifest
from ds_moe_ep.checkpoint.streams import hash_files
from ds_moe_ep.errors import CheckpointError

__all__ = ["check_share", "share"]


def check_share(folder: Path, rank: int, world_size: int) -> None:
    """Compares this rank's share of the files with the manifest; the ranks read each file once.

    Raises:
        CheckpointError: A file is not as it was written.
    """
    if not (folder / MANIFEST_JSON).is_file():
        return
    files = read_manifest(folder).files
    paths = [folder / name for name in share(sorted(files), rank, world_size)]
    try:
        for path, sha256 in hash_files(paths):
            if sha256 != files[path.name].sha256:
                raise CheckpointError(
                    f"{path} is corrupt: its sha256 is not that in {MANIFEST_JSON}. Copy it again "
                    "from its source, or convert the model again. All such files are named by: "
                    f"ds-moe-ep convert {shlex.quote(str(folder))} --verify"
                )
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error}.") from error


def share(names: list[str], rank: int, world_size: int) -> list[str]:
    """Returns a rank's part of the files.

    Of the files with experts, which are in the order of experts, it is those that the rank is about
    to load, if they are in an expert group of all ranks: so they come from memory then.
    """
    experts = [name for name in names if name.startswith("experts-")]
    others = [name for name in names if not name.startswith("experts-")]
    first, end = (len(experts) * each // world_size for each in (rank, rank + 1))
    return experts[first:end] + others[rank::world_size]
