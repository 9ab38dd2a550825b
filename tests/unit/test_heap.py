"""What the C library is told to do with freed memory, counted in pages that the kernel gives."""

import platform
import sys

import pytest

from tests.helpers import run_command

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="the C library is not glibc"
)

# Uses and frees 16 MiB in 4 MiB blocks, more than glibc keeps by itself.
USE = """
import ctypes, resource, sys
from pathlib import Path
from ds_moe_ep import heap
libc = ctypes.CDLL(None)
libc.malloc.restype = libc.memset.restype = ctypes.c_void_p
def use():
    blocks = [ctypes.c_void_p(libc.malloc(ctypes.c_size_t(4 << 20))) for _ in range(4)]
    for block in blocks:
        libc.memset(block, 1, ctypes.c_size_t(4 << 20))
    for block in blocks:
        libc.free(block)
def given_pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def held_pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
getattr(heap, sys.argv[1])()
use()
"""
USE_AGAIN = """
before = given_pages()
for _ in range(5):
    use()
print(given_pages() - before)
"""
RELEASE = """
before = held_pages()
heap.release_freed_memory()
print(before - held_pages())
"""
USED_PAGES = (16 << 20) // 4096


def count(told: str, script: str) -> int:
    ended = run_command([sys.executable, "-c", USE + script, told])
    assert ended.returncode == 0, ended.stderr
    return int(ended.stdout)


def test_kept_memory_is_used_again() -> None:
    assert count("keep_freed_memory", USE_AGAIN) < USED_PAGES // 20


def test_memory_given_back_is_taken_anew() -> None:
    assert count("give_freed_memory_back", USE_AGAIN) > USED_PAGES


def test_kept_memory_can_be_released() -> None:
    assert count("keep_freed_memory", RELEASE) > USED_PAGES * 3 // 4
