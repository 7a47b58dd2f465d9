"""Every Prometheus object of the server, in one table with a registry of its own.

The worker is another process: its observations come as `messages.Sample`, named as here without the prefix.
No adapter's and no training's name is ever a label.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from atelier_server.core import BaseInfo, State
from atelier_server.messages import Heartbeat, Sample

PREFIX = "atelier_"
_log = logging.getLogger(__name__)

_STEP = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_WAIT = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_CALL = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
_LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 16.0)


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table; `buckets` only for a histogram."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    labels: tuple[str, ...]
    help: str
    buckets: tuple[float, ...] = ()


TABLE = (
    Metric("request_duration_seconds", Histogram, ("method", "code"), "Duration of calls.", _CALL),
    Metric("queue_wait_seconds", Histogram, ("kind",), "From admission to the first work.", _WAIT),
    Metric("time_to_first_step_seconds", Histogram, (), "From submission to the first denoise step.", _WAIT),
    Metric("denoise_step_seconds", Histogram, (), "One denoise step of a batch of rows.", _STEP),
    Metric("train_step_seconds", Histogram, (), "One training micro-step.", _STEP),
    Metric("batch_rows", Histogram, (), "Images in a forward; a guided one once, padding not.", _ROWS),
    Metric("queue_depth", Gauge, ("kind",), "Jobs that wait for their first work."),
    Metric("images_total", Counter, (), "Finished pictures."),
    Metric("train_steps_total", Counter, (), "Finished training steps."),
    Metric("training_jobs", Gauge, ("state",), "Trainings in the book by state."),
    Metric("adapter_load_seconds", Histogram, ("source",), "From file or host memory into a slot.", _LOAD),
    Metric("adapters_resident", Gauge, ("tier",), "Checkpoints by the tier that holds them."),
    Metric("adapter_lookups_total", Counter, ("result",), "Slot look-ups: hit or miss."),
    Metric("adapter_evictions_total", Counter, (), "Adapters that made room for others."),
    Metric("vram_bytes", Gauge, ("device", "kind"), "Device memory as the allocator sees it."),
    Metric("vram_component_bytes", Gauge, ("component",), "Device memory by component."),
    Metric("worker_restarts_total", Counter, ("reason",), "Workers lost and started again."),
    Metric("out_of_memory_total", Counter, ("phase",), "Allocations that the device refused."),
)


class Metrics:
    """The registry, and functions named after what happened."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._objects: dict[str, Counter | Gauge | Histogram] = {}
        for metric in TABLE:
            options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
            self._objects[metric.name] = metric.kind(
                PREFIX + metric.name, metric.help, metric.labels, registry=self.registry, **options
            )
        # Known label values exist from the start: a rate over a series that appears late is wrong.
        for kind in ("generate", "train"):
            self.observe(Sample("queue_depth", 0, (kind,)))
        for tier in ("device", "host", "disk"):
            self.observe(Sample("adapters_resident", 0, (tier,)))
        self.training_states({})

    def observe(self, sample: Sample) -> None:
        """One observation. A name or labels that the table lacks are logged, never raised."""
        instrument = self._objects.get(sample.metric)
        try:
            if instrument is None:
                raise ValueError("no such metric")
            child = instrument.labels(*sample.labels) if sample.labels else instrument
            if isinstance(child, Counter):
                child.inc(sample.value)
            elif isinstance(child, Gauge):
                child.set(sample.value)
            else:
                child.observe(sample.value)
        except ValueError as error:
            _log.error("dropped %r: %s", sample, error)

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self.observe(Sample("request_duration_seconds", seconds, (method, code)))

    def work_began(self, kind: str, waited_seconds: float) -> None:
        self.observe(Sample("queue_wait_seconds", waited_seconds, (kind,)))

    def queue_depth(self, kind: str, depth: int) -> None:
        self.observe(Sample("queue_depth", depth, (kind,)))

    def training_states(self, counts: Mapping[State, int]) -> None:
        for state in State:
            self.observe(Sample("training_jobs", counts.get(state, 0), (state.value,)))

    def stored_checkpoints(self, count: int) -> None:
        self.observe(Sample("adapters_resident", count, ("disk",)))

    def worker_lost(self, exit_code: int | None) -> None:
        reason = "signal" if exit_code is not None and exit_code < 0 else "exit"
        self.observe(Sample("worker_restarts_total", 1, (reason,)))
        self.observe(Sample("adapters_resident", 0, ("device",)))

    def heartbeat(self, heartbeat: Heartbeat, base: BaseInfo) -> None:
        self.observe(Sample("adapters_resident", len(heartbeat.resident), ("device",)))
        for kind, value in (
            ("allocated", heartbeat.memory_allocated_bytes),
            ("reserved", heartbeat.memory_reserved_bytes),
            ("peak", heartbeat.memory_peak_bytes),
            ("total", base.memory_total_bytes),
        ):
            self.observe(Sample("vram_bytes", value, (base.device, kind)))
        for component, value in heartbeat.component_bytes:
            self.observe(Sample("vram_component_bytes", value, (component,)))


class MetricsServer:
    """/metrics over HTTP, answered by a thread of its own from what has been observed already."""

    def __init__(self, metrics: Metrics, host: str, port: int) -> None:
        server, self._thread = start_http_server(port, addr=host, registry=metrics.registry)
        self._server: WSGIServer = server
        self.port = int(server.server_port)

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        _join(self._thread)


def _join(thread: threading.Thread) -> None:
    thread.join(timeout=5)
