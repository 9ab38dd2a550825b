"""What this machine has to offer a job: GPUs, counted without importing torch, and a port."""

import itertools
import os
import re
import shutil
import socket
import subprocess

from ds_moe_ep.errors import ConfigError

__all__ = [
    "count_local_gpus",
    "free_port",
    "local_gpus",
    "num_usable_cores",
    "one_thread_each",
    "threads_of_rank",
]


def count_local_gpus() -> int:
    """Return how many NVIDIA GPUs a job started here is to use; 0 if there are none.

    `CUDA_VISIBLE_DEVICES` narrows the number.
    """
    num_gpus = _count_device_files() or _count_by_nvidia_smi()
    named = _named_gpus()
    return num_gpus if named is None else min(num_gpus, len(named))


def local_gpus() -> tuple[int, ...]:
    """Return the numbers of the GPUs that `count_local_gpus` counts.

    DeepSpeed's launcher does not heed `CUDA_VISIBLE_DEVICES`, but takes numbers.

    Raises:
        ConfigError: It names GPUs in another way than by number.
    """
    named, num_gpus = _named_gpus(), count_local_gpus()
    if named is None or num_gpus == 0:
        return tuple(range(num_gpus))
    if not all(entry.isdigit() for entry in named):
        raise ConfigError(
            f"CUDA_VISIBLE_DEVICES={','.join(named)}: DeepSpeed's launcher takes GPUs by number, "
            f"and would use others than these {num_gpus}. Give their numbers there, as nvidia-smi "
            "lists them, or say how many to use, from 0 on: --num-gpus N."
        )
    return tuple(map(int, named[:num_gpus]))


def _named_gpus() -> list[str] | None:
    """Return what CUDA_VISIBLE_DEVICES names; None if it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    # CUDA ignores everything from the first entry on that names no device, such as -1.
    entries = [entry.strip() for entry in visible.split(",")]
    return list(itertools.takewhile(lambda entry: entry not in ("", "-1"), entries))


def free_port() -> int:
    """Return a port of the loopback interface on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def num_usable_cores() -> int:
    """Return how many cores this process may use, which may be fewer than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads_of_rank(num_ranks: int) -> int | None:
    """Return how many threads each of the ranks on this machine should compute with.

    Left alone, torch takes all cores on each rank, and ranks wait for threads that wait for cores.

    Args:
        num_ranks: ranks of the job on this machine.

    Returns:
        An equal share of the cores this process may use, 1 at least; None if `OMP_NUM_THREADS`
        says how many.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return max(1, num_usable_cores() // num_ranks)


def one_thread_each() -> dict[str, str]:
    """Return this process's environment, for ranks that share the cores of this machine."""
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    if count_local_gpus() == 0:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def _count_device_files() -> int:
    """Count /dev/nvidia0 and so on: what a container was given, at no cost."""
    try:
        return sum(re.fullmatch(r"nvidia\d+", name) is not None for name in os.listdir("/dev"))
    except OSError:
        return 0


def _count_by_nvidia_smi() -> int:
    """Ask the driver's own tool where GPUs have no device files, as under WSL."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        listing = subprocess.run(
            [tool, "-L"], capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())
