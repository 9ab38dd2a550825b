"""Serves the figures of all ranks to Prometheus, from rank 0.

The number of series is bounded: a handful for each rank, none for each expert.
"""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from ds_moe_ep.errors import ResourceError
from ds_moe_ep.monitor.figures import JobNow, figures

__all__ = ["Exporter", "SampleCollector"]

_OF_RANK = {
    "utilisation_ratio": ("utilisation", "Share of the last second in which the rank was busy."),
    "memory_bytes": ("memory_bytes", "Memory that the rank uses."),
    "batch_size": ("batch_size", "Prompts that the rank works on."),
    "prompts_queued": ("prompts_queued", "Prompts that the rank has not begun."),
    "step": ("step", "Forward passes that the rank has taken part in."),
}
_OF_RANK_TOTAL = {
    "new_tokens": ("new_tokens", "Tokens that the rank has generated."),
    "prompts_done": ("prompts_done", "Prompts that the rank has finished."),
    "collectives": ("collectives", "Collectives that the rank has taken part in."),
    "collective_seconds": ("collectives_s", "Seconds of those, waiting for other ranks included."),
}
_OF_JOB = {
    "tokens_per_second": "Generated tokens a second since the first batch started, of all ranks.",
    "memory_variance": "(max - min) / mean over ranks of the memory they use.",
    "balancedness": "Mean / max over ranks of the rows their experts computed in the last passes.",
    "balancedness_worst_layer": "The same of the layer in which it is least.",
}


class SampleCollector(Collector):
    """Turns the last sample of each rank into metrics when Prometheus asks."""

    def __init__(self) -> None:
        self._now = JobNow(())

    def update(self, now: JobNow) -> None:
        """Takes how the job is."""
        self._now = now

    def collect(self) -> Iterable[Metric]:
        """Yields the metrics."""
        now = self._now  # the sampler's thread may put another in its place meanwhile
        samples = now.samples
        for name, (field, text) in _OF_RANK.items():
            gauge = GaugeMetricFamily(f"ds_moe_ep_{name}", text, labels=["rank"])
            for sample in samples:
                gauge.add_metric([str(sample.rank)], getattr(sample, field))
            yield gauge
        for name, (field, text) in _OF_RANK_TOTAL.items():
            counter = CounterMetricFamily(f"ds_moe_ep_{name}", text, labels=["rank"])
            for sample in samples:
                counter.add_metric([str(sample.rank)], getattr(sample, field))
            yield counter
        if samples:
            of_job = figures(now)
            for name, text in _OF_JOB.items():
                if name in of_job:
                    yield GaugeMetricFamily(f"ds_moe_ep_{name}", text, value=of_job[name])


class Exporter:
    """The HTTP server that Prometheus asks.

    Args:
        port: TCP port on all addresses of this host.

    Raises:
        ResourceError: The port is taken, or not allowed.
    """

    def __init__(self, port: int) -> None:
        self._collector = SampleCollector()
        registry = CollectorRegistry()
        registry.register(self._collector)
        try:
            self._server, self._thread = start_http_server(port, registry=registry)
        except OSError as error:
            raise ResourceError(
                f"--metrics-port {port}: {error.strerror}. Name a port that is free on rank 0."
            ) from error

    def update(self, now: JobNow) -> None:
        """Takes how the job is."""
        self._collector.update(now)

    def close(self) -> None:
        """Gives the port back."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
