"""What a process reads and holds, as the Linux kernel counts it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from ds_moe_ep.host_memory import proportional_bytes

__all__ = ["PeakMemory", "read_bytes_so_far"]

_INTERVAL_S, _MOST_OF_TIME = 0.01, 0.1


class PeakMemory:
    """The most memory this process holds while the context is open.

    Counted is its proportional set size: its own pages, and of those it shares (libraries) its
    share, so that the figures of all ranks add up to what the machine holds. It is sampled every
    10 ms, or as often as takes a tenth of the time, so do not time what runs meanwhile.
    """

    def __init__(self) -> None:
        self.num_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @staticmethod
    def now() -> int:
        """Returns what this process holds at this moment."""
        found = proportional_bytes()
        if found is None:
            raise RuntimeError(
                "/proc/self/smaps_rollup, which tells a process's memory, is not there"
            )
        return found

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        took_s = 0.0
        # The kernel goes through all pages and who shares them: of 64 ranks on two cores, looking
        # each 10 ms would be all that they do.
        while not self._stop.wait(max(_INTERVAL_S, took_s * (1 / _MOST_OF_TIME - 1))):
            start_s = time.perf_counter()
            self._look()
            took_s = time.perf_counter() - start_s

    def _look(self) -> None:
        self.num_bytes = max(self.num_bytes, self.now())


def read_bytes_so_far() -> int:
    """Returns the bytes this process has read from files, from the page cache or not.

    Mapped files are not counted.
    """
    lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])
