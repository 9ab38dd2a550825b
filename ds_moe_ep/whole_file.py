"""Writes a file that is there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

from ds_moe_ep.errors import InputError

__all__ = ["check_writable", "remove_unfinished", "sync_folder", "write_lines"]


def check_writable(path: Path) -> None:
    """Finds out whether `write_lines` could write this file, without a trace in the folder.

    Raises:
        InputError: It could not; said before any work is done for it.
    """
    target = _target(path)
    folder = target.parent
    if os.path.exists(target) and not os.path.isfile(target):
        kind = "a folder" if os.path.isdir(target) else "not a regular file"
        raise InputError(f"{path}: is {kind}. Name a file for the results.")
    if not os.path.exists(folder):
        command = shlex.join(["mkdir", "-p", str(folder)])
        raise InputError(f"{path}: the folder {folder} does not exist. Make it: {command}")
    if not os.path.isdir(folder):
        raise InputError(f"{path}: {folder} is a file, not a folder. Choose another folder.")
    try:
        descriptor, temporary = _open_temporary(target)
        os.close(descriptor)
        temporary.unlink(missing_ok=True)  # a job that starts just now may have removed it
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror}). Choose a folder that you may write to."
        ) from None


def remove_unfinished(path: Path) -> None:
    """Removes what writers of this file have left beside it that were killed.

    Args:
        path: The file, which nobody else may be writing now; a job has the lock of its journals.
    """
    target = _target(path)
    left = re.compile(rf"\.{re.escape(target.name)}\.\d+\.tmp")
    with contextlib.suppress(OSError):  # what stays does no harm
        for each in target.parent.iterdir():
            if left.fullmatch(each.name):
                each.unlink()


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Writes a text file, replacing what was there in one step.

    A reader sees the old file or all of the new one, also after a crash. A link is followed: the
    file it points to is replaced.

    Args:
        path: The file, in a folder that is there.
        lines: Its lines, each with its end.

    Raises:
        OSError: The disk is full, say; the old file is untouched and nothing is left behind.
    """
    target = _target(path)
    descriptor, temporary = _open_temporary(target)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder survive a power cut, where the file system can."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _target(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _open_temporary(target: Path) -> tuple[int, Path]:
    """Creates a new file beside `target`, with the mode the umask gives to any new file."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    # One that a killed process with this id left behind is used again.
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    return os.open(temporary, flags, 0o666), temporary
