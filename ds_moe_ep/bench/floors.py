"""What this machine's hardware does at best, as floors for what is measured on it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ds_moe_ep.bench.timing import time_in_turn

__all__ = ["copy_rate", "matmul_rate", "wait"]


def copy_rate(device: torch.device, rounds: int) -> float:
    """Returns bytes a second, of reading and writing, of a large copy."""
    source = torch.ones(1 << (31 if device.type == "cuda" else 26), dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda: target.copy_(source), device, rounds)


def matmul_rate(device: torch.device, dtype: torch.dtype, rounds: int) -> float:
    """Returns operations a second of a large matrix product."""
    size = 8192 if device.type == "cuda" else 1024
    matrix = torch.randn((size, size), device=device, dtype=dtype)
    return 2 * size**3 / _fastest(lambda: matrix @ matrix, device, rounds)


def wait(device: torch.device) -> None:
    """Waits for what a GPU was told to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fastest(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    def run_and_wait() -> None:
        run()
        wait(device)

    run_and_wait()
    return time_in_turn({"it": run_and_wait}, rounds)["it"].min
