"""What a host has of that which a job needs: packages, this package's code, GPUs, disk, the model.

It needs nothing but Python's own library and imports nothing of the package: the survey sends this
file to hosts on which anything may be missing. Judging the facts is not its business.

Use: python - REQUEST < host_facts.py (REQUEST: the arguments of `read_facts`, as a JSON object)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["MARK", "PACKAGES", "free_bytes", "model_files", "read_facts"]

PACKAGES = ("torch", "deepspeed", "transformers", "safetensors", "ds_moe_ep")
"""The packages whose versions must be the same on all hosts."""

MARK = "ds_moe_ep facts: "
"""Begins the line with the answer: a login shell may print lines of its own before it."""

_SUFFIXES = (".json", ".safetensors", ".model", ".txt", ".jinja", ".tiktoken")
_CHUNK_BYTES = 8 << 20
_LENGTH_BYTES = 8  # of the length that a safetensors file begins with
_MOST_HEADER_BYTES = 100 << 20  # safetensors' own bound


def read_facts(
    *,
    folder: str | None = None,
    model: str | None = None,
    whole_files: bool = False,
    code: bool = True,
    places: tuple[str, ...] | list[str] = (),
) -> dict[str, Any]:
    """Reads the facts of this host.

    Args:
        folder: Where the job is to be started; None is the present one.
        model: The model directory; None leaves it out.
        whole_files: Whether model files are hashed whole, or as far as `model_files` says.
        code: Whether the package's sources are hashed.
        places: Folders whose free disk space is told.

    Returns:
        What is below, in types of JSON. What cannot be read is None.
    """
    has_folder = True
    if folder is not None:
        try:
            os.chdir(folder)
        except OSError:
            has_folder = False
    return {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "code_sha256": _code_sha256() if code else None,
        "has_folder": has_folder,
        "num_gpus": _num_gpus(),
        "free_bytes": {place: free_bytes(place) for place in places},
        "model_files": model_files(model, whole_files) if model is not None else {},
    }


def model_files(folder: str, whole_files: bool) -> dict[str, list[Any]] | None:
    """Lists the files of a model directory that a job reads.

    Args:
        folder: The directory.
        whole_files: Whether every file is hashed whole. If not, then JSON files are, and of
            safetensors files the header, which names every tensor, its type, shape and place.

    Returns:
        Bytes and sha256 of each file (None where nothing of it was hashed); None if the directory
        cannot be read.
    """
    try:
        names = sorted(n for n in os.listdir(folder) if n.endswith(_SUFFIXES) and n[0] != ".")
        found: dict[str, list[Any]] = {}
        for name in names:
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                found[name] = [os.path.getsize(path), _sha256(path, whole_files)]
        return found
    except OSError:
        return None


def _sha256(path: str, whole_file: bool) -> str | None:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        if whole_file or path.endswith(".json"):
            for chunk in iter(lambda: file.read(_CHUNK_BYTES), b""):
                digest.update(chunk)
            return digest.hexdigest()
        if path.endswith(".safetensors"):
            length = file.read(_LENGTH_BYTES)
            num_bytes = min(int.from_bytes(length, "little"), _MOST_HEADER_BYTES)
            digest.update(length + file.read(num_bytes))
            return digest.hexdigest()
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _code_sha256() -> str | None:
    """Hashes the package's sources: a checkout may differ and say the same version."""
    try:
        spec = importlib.util.find_spec("ds_moe_ep")
    except (ImportError, ValueError):
        return None
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _num_gpus() -> int:
    """Counts NVIDIA GPUs: by their device files, else by the driver's own tool."""
    try:
        count = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    except OSError:
        count = 0
    tool = shutil.which("nvidia-smi")
    if count or tool is None:
        return count
    try:
        listing = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def free_bytes(place: str) -> int | None:
    """Returns the free disk space of a folder; None if it is not known."""
    try:
        return shutil.disk_usage(place).free
    except OSError:
        return None


if __name__ == "__main__":
    print(MARK + json.dumps(read_facts(**json.loads(sys.argv[1]))))
