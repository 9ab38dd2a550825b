"""Looks at every rank once a second while a job runs: utilisation, memory, progress, balance.

Each rank leaves what it has to tell in the store of the rendezvous, and rank 0 takes all of it: so
nobody needs a shared folder, and no collective is involved. What is done with it is said by those
who listen.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from ds_moe_ep import host_memory
from ds_moe_ep.config.strict import Strict
from ds_moe_ep.monitor.figures import JobNow
from ds_moe_ep.monitor.metrics_format import Sample
from ds_moe_ep.monitor.windows import Border, LiveBalance

__all__ = ["Sampler", "Told", "Usage"]

_EVERY_S = 1.0
_PATIENCE_S = 5.0  # at the end of a job, for a thread that may wait for a store that has gone


class Usage:
    """How busy this rank is, and what memory it uses.

    Args:
        device: Its device. Of a GPU the driver is asked (nvidia-ml-py).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # To ask each second would cost 2% of a core.
        self._shared_bytes = host_memory.share_of_others_bytes()
        self._since = time.perf_counter(), time.process_time()

    def utilisation(self) -> float:
        """Returns the share of the time since the last call, or of the driver's last period."""
        if self._device.type == "cuda":
            return _gpu_utilisation(self._device)
        now = time.perf_counter(), time.process_time()
        elapsed_s, busy_s = now[0] - self._since[0], now[1] - self._since[1]
        self._since = now
        return busy_s / max(elapsed_s, 1e-9) / torch.get_num_threads()

    def memory_bytes(self) -> int:
        """Returns what is used of the GPU, or by this process with its share of shared pages.

        The share is that of the moment when this object was made.
        """
        if self._device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self._device)
            return total_bytes - free_bytes
        return max(0, (host_memory.resident_bytes() or 0) - self._shared_bytes)


def _gpu_utilisation(device: torch.device) -> float:
    try:
        return torch.cuda.utilization(device) / 100
    except Exception as error:  # the driver's own kinds; it cannot tell of a part of a GPU (MIG)
        warnings.warn(
            f"The driver does not tell how busy {device} is ({error}): recorded as 0.",
            stacklevel=1,  # one place, so that it is said once
        )
        return 0.0


class Told(Strict):
    """What a rank leaves in the store: its sample, and its recent borders (see windows.py)."""

    sample: Sample
    borders: list[Border]


class Sampler:
    """The thread that looks, on each rank.

    Args:
        rank: Global rank.
        world_size: How many there are.
        look: Takes a sample of this rank.
        borders: Returns its recent borders.
        store: Of the rendezvous; None for a job of one rank.
        listeners: Told on rank 0, at each look, how the job is.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        look: Callable[[], Sample],
        borders: Callable[[], list[Border]],
        store: dist.Store | None,
        listeners: Sequence[Callable[[JobNow], None]] = (),
    ) -> None:
        self._rank, self._world_size = rank, world_size
        self._look, self._borders, self._listeners = look, borders, listeners
        self._balance = LiveBalance(world_size, len(borders()[0].rows))
        # A connection of its own: a question on it never holds up the job's.
        self._store = store.clone() if store is not None and world_size > 1 else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._last = Told(sample=look(), borders=borders())
        self._num_looks, self._utilisations = 0, 0.0
        self._tell_others()

    @property
    def utilisation(self) -> float:
        """Mean of all looks but that of the constructor, which is of no time at all."""
        return self._utilisations / max(1, self._num_looks)

    def start(self) -> None:
        """Starts looking; every rank must have made its sampler before rank 0 calls this."""
        self._thread.start()

    def stop(self) -> None:
        """Takes a last sample and ends the thread."""
        self._done.set()
        self._thread.join(_PATIENCE_S)

    def sample(self) -> None:
        """Looks at this rank now, and leaves what there is to tell in the store."""
        self._last = Told(sample=self._look(), borders=self._borders())
        self._num_looks += 1
        self._utilisations += self._last.sample.utilisation
        self._tell_others()

    def tell(self) -> None:
        """Tells the listeners what every rank told last."""
        everyone = [self._last]
        if self._store is not None:
            texts = self._store.multi_get([_key(rank) for rank in range(self._world_size)])
            everyone = [Told.model_validate_json(text) for text in texts]
        self._balance.update([told.borders for told in everyone])
        now = JobNow([told.sample for told in everyone], self._balance.window)
        for listen in self._listeners:
            listen(now)

    def _tell_others(self) -> None:
        if self._store is not None:
            self._store.set(_key(self._rank), self._last.model_dump_json())

    def _run(self) -> None:
        try:
            while not self._done.wait(_EVERY_S):
                self.sample()
                if self._listeners:
                    self.tell()
            self.sample()
        except (dist.DistError, RuntimeError):
            return  # the store has gone: the job itself says so


def _key(rank: int) -> str:
    return f"sample/{rank}"
