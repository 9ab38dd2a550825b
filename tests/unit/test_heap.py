"""What the C library is told to do with freed memory, counted in pages that the kernel hands out."""

import platform
import sys

import pytest

from tests.helpers import run_command

# 16 MiB in 4 MiB blocks, more than glibc keeps by itself; a block that ends the heap is freed last.
COUNT_FAULTS = """
import ctypes, resource, sys
from ds_moe_ep import heap
getattr(heap, sys.argv[1])()
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
def use():
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 << 20))) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, ctypes.c_size_t(4 << 20))
    for block in blocks:
        libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 5 * (16 << 20) // 4096


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
@pytest.mark.parametrize(
    ("told", "least", "most"),
    [("keep_freed_memory", 0, PAGES // 100), ("give_freed_memory_back", PAGES // 20, 2 * PAGES)],
)
def test_freed_memory_is_kept_or_given_back(told: str, least: int, most: int) -> None:
    ended = run_command([sys.executable, "-c", COUNT_FAULTS, told])
    assert ended.returncode == 0, ended.stderr
    assert least <= int(ended.stdout) <= most
