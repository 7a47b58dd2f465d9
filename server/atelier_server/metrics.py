"""Every Prometheus object of the server, in one table with a registry of its own.

The worker is another process: its observations come as `messages.Sample`, named as here without the prefix,
so a scrape reads the front's memory and never waits for the device. No adapter's, training's, tenant's or
request's name is ever a label: a label has the values that the table lists, or one of the few that the
server itself knows (the methods that it has, its device, its version).
"""

from __future__ import annotations

import importlib.metadata
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    start_http_server,
)

from atelier_server.core import BaseInfo, State
from atelier_server.messages import Heartbeat, Sample, Timings

PREFIX = "atelier_"
_log = logging.getLogger(__name__)

_STEP = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_WAIT = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_CALL = (0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
_PHASE = (0.001, 0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0)
_LOAD = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_ROWS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 12.0, 16.0)

# The values of a label, where all of them are known beforehand; FREE where the server fills them in.
FREE: tuple[str, ...] = ()
# The names of gRPC's statuses (https://grpc.io/docs/guides/status-codes/).
_CODES = (
    *("OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS"),
    *("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE"),
    *("UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED"),
)
_KIND = {"kind": ("generate", "train")}
_PHASES = ("queue", "text_encode", "denoise", "decode", "image_encode")
_COMPONENTS = ("base", "bank", "training", "activations", "runtime")


@dataclass(frozen=True, slots=True)
class Metric:
    """One line of the table: `labels` with their values, `buckets` only for a histogram."""

    name: str
    kind: type[Counter] | type[Gauge] | type[Histogram]
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()


TABLE = (
    # -- calls
    Metric(
        "request_duration_seconds",
        Histogram,
        "Duration of calls.",
        {"method": FREE, "code": _CODES},
        _CALL,
    ),
    Metric("requests_in_progress", Gauge, "Calls that have no status yet.", {"method": FREE}),
    Metric("phase_seconds", Histogram, "Phases of a generation.", {"phase": _PHASES}, _PHASE),
    # -- queue
    Metric("queue_wait_seconds", Histogram, "From admission to the first work.", _KIND, _WAIT),
    Metric("queue_depth", Gauge, "Jobs that wait for their first work.", _KIND),
    Metric("queue_limit", Gauge, "Jobs that may wait or run before others are refused.", _KIND),
    # -- device
    Metric("time_to_first_step_seconds", Histogram, "From submission to the first denoise step.", {}, _WAIT),
    Metric("denoise_step_seconds", Histogram, "One denoise step of a batch of rows.", {}, _STEP),
    Metric("batch_rows", Histogram, "Images in a forward; a guided one once, padding not.", {}, _ROWS),
    Metric("images_total", Counter, "Finished pictures."),
    Metric("images_in_progress", Gauge, "Pictures that have started and are not finished."),
    Metric(
        "vram_bytes",
        Gauge,
        "Device memory as the allocator sees it; on a CPU that of the worker's process.",
        {"device": FREE, "kind": ("allocated", "reserved", "peak", "total")},
    ),
    Metric(
        "vram_component_bytes",
        Gauge,
        "What the allocated device memory is: weights, adapters in slots, trainings' weights, optimizers and"
        " cached latents, work in progress, and libraries (runtime).",
        {"component": _COMPONENTS},
    ),
    Metric(
        "out_of_memory_total",
        Counter,
        "Allocations that the device refused.",
        {"phase": ("generate", "train")},
    ),
    # -- adapters
    Metric(
        "adapter_load_seconds",
        Histogram,
        "From a file or host memory into a slot.",
        {"source": ("device", "host", "disk", "remote")},
        _LOAD,
    ),
    Metric(
        "adapters_resident",
        Gauge,
        "Checkpoints by the tier that holds them.",
        {"tier": ("device", "host", "disk")},
    ),
    Metric("adapters_pinned", Gauge, "Adapters that keep their slots until they are unloaded."),
    Metric("adapter_lookups_total", Counter, "Slot look-ups.", {"result": ("hit", "miss")}),
    Metric("adapter_evictions_total", Counter, "Adapters that made room for others."),
    # -- trainings
    Metric(
        "training_jobs",
        Gauge,
        "Trainings in the book by state.",
        {"state": tuple(state.value for state in State)},
    ),
    Metric("train_step_seconds", Histogram, "One training micro-step.", {}, _STEP),
    Metric("train_steps_total", Counter, "Finished training steps."),
    # -- health
    Metric("worker_ready", Gauge, "1 while a worker is ready to work, else 0."),
    Metric(
        "worker_restarts_total",
        Counter,
        "Workers lost and started again.",
        {"reason": ("signal", "exit", "stalled")},
    ),
    Metric("build_info", Gauge, "1, labelled with the server's version.", {"version": FREE}),
)


class Metrics:
    """The registry, and functions named after what happened."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._table = {metric.name: metric for metric in TABLE}
        self._objects: dict[str, Counter | Gauge | Histogram] = {}
        for metric in TABLE:
            options: dict[str, Any] = {"buckets": metric.buckets} if metric.buckets else {}
            made = metric.kind(
                PREFIX + metric.name, metric.help, tuple(metric.labels), registry=self.registry, **options
            )
            self._objects[metric.name] = made
            # Known series exist from the start: a rate over one that appears late is wrong.
            if metric.labels:
                for values in product(*metric.labels.values()):
                    made.labels(*values)
        self.observe(Sample("build_info", 1, (importlib.metadata.version("atelier"),)))

    def observe(self, sample: Sample) -> None:
        """One observation. A name or labels that the table lacks are logged, never raised."""
        try:
            child = self._series(sample)
        except ValueError as error:
            _log.error("dropped %r: %s", sample, error)
            return
        if isinstance(child, Counter):
            child.inc(sample.value)
        elif isinstance(child, Gauge):
            child.set(sample.value)
        else:
            child.observe(sample.value)

    def _series(self, sample: Sample) -> Counter | Gauge | Histogram:
        """Raises ValueError for a metric, a label or a label's value that the table lacks."""
        if (metric := self._table.get(sample.metric)) is None:
            raise ValueError("no such metric")
        if len(sample.labels) != len(metric.labels):
            raise ValueError(f"its labels are {', '.join(metric.labels) or 'none'}")
        for (name, known), value in zip(metric.labels.items(), sample.labels, strict=True):
            if known and value not in known:
                raise ValueError(f"{name} is none of {', '.join(known)}")
        instrument = self._objects[sample.metric]
        return instrument.labels(*sample.labels) if sample.labels else instrument

    # ---------------------------------------------------------------------------------------------- calls
    def call_began(self, method: str) -> None:
        """`method` is one that the server has: what a client writes never becomes a label."""
        self._in_progress(method).inc()

    def call_left(self, method: str) -> None:
        """The connection needs nothing more of a call, however it ended."""
        self._in_progress(method).dec()

    def call_ended(self, method: str, code: str, seconds: float) -> None:
        self.observe(Sample("request_duration_seconds", seconds, (method, code)))

    def _in_progress(self, method: str) -> Gauge:
        series = self._series(Sample("requests_in_progress", 0, (method,)))
        assert isinstance(series, Gauge)
        return series

    def generation_completed(self, timings: Timings) -> None:
        for phase, seconds in zip(
            _PHASES,
            (
                timings.queue_seconds,
                timings.encode_seconds,
                timings.denoise_seconds,
                timings.decode_seconds,
                timings.image_encode_seconds,
            ),
            strict=True,
        ):
            self.observe(Sample("phase_seconds", seconds, (phase,)))

    # ---------------------------------------------------------------------------------------------- queue
    def work_began(self, kind: str, waited_seconds: float) -> None:
        self.observe(Sample("queue_wait_seconds", waited_seconds, (kind,)))

    def queue_depth(self, kind: str, depth: int) -> None:
        self.observe(Sample("queue_depth", depth, (kind,)))

    def queue_limit(self, kind: str, limit: int) -> None:
        self.observe(Sample("queue_limit", limit, (kind,)))

    # ----------------------------------------------------------------------------------------- the book
    def training_states(self, counts: Mapping[State, int]) -> None:
        for state in State:
            self.observe(Sample("training_jobs", counts.get(state, 0), (state.value,)))

    def stored_checkpoints(self, count: int) -> None:
        """Counted anew, which reads the whole store; between two countings `stored_changed` keeps up."""
        self.observe(Sample("adapters_resident", count, ("disk",)))

    def stored_changed(self, by: int) -> None:
        series = self._series(Sample("adapters_resident", by, ("disk",)))
        assert isinstance(series, Gauge)
        series.inc(by)

    # ----------------------------------------------------------------------------------------- the worker
    def worker_ready(self) -> None:
        self.observe(Sample("worker_ready", 1))

    def worker_gone(self, base: BaseInfo | None) -> None:
        """Whatever it held is free."""
        self.observe(Sample("worker_ready", 0))
        if base is not None:
            self.heartbeat(Heartbeat(0, 0, 0, (), 0, 0, 0, tuple((c, 0) for c in _COMPONENTS)), base)

    def worker_lost(self, exit_code: int | None, *, stalled: bool = False) -> None:
        ended = "signal" if exit_code is not None and exit_code < 0 else "exit"
        reason = "stalled" if stalled else ended
        self.observe(Sample("worker_restarts_total", 1, (reason,)))

    def heartbeat(self, heartbeat: Heartbeat, base: BaseInfo) -> None:
        self.observe(Sample("images_in_progress", heartbeat.running_images))
        self.observe(Sample("adapters_resident", len(heartbeat.resident), ("device",)))
        self.observe(Sample("adapters_resident", heartbeat.host_adapters, ("host",)))
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
