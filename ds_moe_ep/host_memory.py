"""What the Linux kernel says of memory: what a process holds, and what the machine can still give.

Elsewhere than on Linux nothing is known, and the functions say so.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["available_bytes", "proportional_bytes", "resident_bytes", "share_of_others_bytes"]

_KIB = 1024
# A group without a limit has, in version 1, the highest multiple of a page instead.
_NO_LIMIT_BYTES = 1 << 60


def proportional_bytes(pid: int | None = None) -> int | None:
    """Return the proportional set size of a process; None if it is not known, or has ended.

    That is its own pages, and of those it shares with others its share.

    Args:
        pid: the process; None is this one.
    """
    return _field(Path(f"/proc/{pid or 'self'}/smaps_rollup"), "Pss:")


def resident_bytes() -> int | None:
    """Return the resident set size of this process, shared pages counted whole; None if not known.

    The kernel keeps count of it, while for the proportional one it goes through all pages.
    """
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return None
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def share_of_others_bytes() -> int:
    """Return by how much the resident set size of this process exceeds its proportional one.

    Returns:
        0 if it is not known.
    """
    resident, own = resident_bytes(), proportional_bytes()
    return 0 if resident is None or own is None else max(0, resident - own)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return what new processes could take without swapping, limits of the cgroup respected.

    Args:
        root: where /proc and /sys are.

    Returns:
        None if it is not known.
    """
    available = _field(root / "proc/meminfo", "MemAvailable:")
    if available is None:
        return None
    return max(0, min([available, *_left_in_cgroups(root)]))


def _left_in_cgroups(root: Path) -> list[int]:
    """Return what is left under the limit of each memory cgroup this process is in."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, limit, used = "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            base, limit, used = (
                "sys/fs/cgroup/memory",
                "memory.limit_in_bytes",
                "memory.usage_in_bytes",
            )
        else:
            continue
        # In a container the path may be that outside of it, while its own group is at the top.
        for folder in _upwards(root / base, path):
            most, now = _number(folder / limit), _number(folder / used)
            if most is not None and now is not None and most < _NO_LIMIT_BYTES:
                left.append(most - now + _reclaimable_bytes(folder))
    return left


def _upwards(top: Path, path: str) -> list[Path]:
    folder = top / path.lstrip("/")
    return [each for each in (folder, *folder.parents) if each == top or top in each.parents]


def _reclaimable_bytes(folder: Path) -> int:
    """Return the file pages that a cgroup counts as used, and gives up when asked."""
    try:
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # "max" is no limit
        return None


def _field(path: Path, name: str) -> int | None:
    """Return a field that the kernel gives in KiB, in bytes."""
    try:
        lines = path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, rest = line.partition(" ")
        if key == name:
            return int(rest.split()[0]) * _KIB
    return None
