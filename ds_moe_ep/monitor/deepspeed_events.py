"""Hands figures to DeepSpeed's own monitor: TensorBoard, CSV, W&B or Comet, as the user has set up.

Which of them is used stands in the DeepSpeed JSON of the run, in DeepSpeed's own sections.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from deepspeed.monitor.config import get_monitor_config
from deepspeed.monitor.monitor import MonitorMaster
from pydantic import ValidationError

from ds_moe_ep.errors import ConfigError
from ds_moe_ep.monitor.figures import JobNow, figures

__all__ = ["DeepSpeedEvents"]

# As often as people look; each of the monitors opens a file or a connection for it.
_EVERY_S = 5.0


class DeepSpeedEvents:
    """DeepSpeed's monitor, on rank 0, with this package's figures.

    Args:
        sections: Of the DeepSpeed JSON: ``tensorboard``, ``csv_monitor``, ``wandb``, ``comet``.

    Raises:
        ConfigError: A section is not what DeepSpeed takes, its library is not installed, or what
            it asks for cannot be opened.
    """

    def __init__(self, sections: Mapping[str, Any]) -> None:
        self._monitors = {name: _monitor(name, section) for name, section in sections.items()}
        self._now = JobNow(())
        self._next_s = 0.0

    def update(self, now: JobNow) -> None:
        """Takes how the job is, and writes the figures if it is time."""
        self._now = now
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            self._write()

    def close(self) -> None:
        """Writes the last figures, and waits until they are out.

        W&B and Comet send in the background, and wait for it as Python ends: ranks end without.
        """
        if self._now.samples:
            self._write()
        for name, monitor in list(self._monitors.items()):
            with self._told(name):
                if monitor.wandb_monitor is not None:
                    import wandb

                    wandb.finish()
                if monitor.comet_monitor is not None:
                    monitor.comet_monitor.experiment.end()

    def _write(self) -> None:
        step = max(sample.step for sample in self._now.samples)
        of_job = figures(self._now)
        events = [(f"ds_moe_ep/{name}", value, step) for name, value in of_job.items()]
        for name, monitor in list(self._monitors.items()):
            with self._told(name):
                monitor.write_events(events)

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Says, instead of ending the job or its sampler, that a monitor has failed; it rests."""
        try:
            yield
        except Exception as error:  # W&B and Comet raise classes of their own
            del self._monitors[name]
            warnings.warn(
                f"{name}: {_reason(error)}. The job goes on, but DeepSpeed's monitor gets no more "
                "of its figures.",
                stacklevel=1,
            )


def _monitor(name: str, section: Any) -> MonitorMaster:
    try:
        return MonitorMaster(get_monitor_config({name: section}))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"{where}: {first['msg']}. DeepSpeed's monitor does not take it."
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"{name}: {error}. Install what that section needs, or set its enabled to false."
        ) from None
    except Exception as error:  # W&B and Comet raise classes of their own
        raise ConfigError(
            f"{name}: {_reason(error)}. DeepSpeed's monitor cannot start: give it what that "
            "section needs, or set its enabled to false."
        ) from error


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
