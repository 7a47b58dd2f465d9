"""The composition root: the only place where things are constructed and wired; signals, drain."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import grpc.aio

from atelier_server import logs
from atelier_server.access.identity import Identity
from atelier_server.adapters.store import AdapterStore
from atelier_server.config import Settings
from atelier_server.data_directory import DataDirectory
from atelier_server.errors import StartError, StoreUnavailable
from atelier_server.jobs.book import Book
from atelier_server.jobs.calls import Calls
from atelier_server.jobs.checkpoints import Checkpoints, count_checkpoints
from atelier_server.jobs.craft import Craft
from atelier_server.jobs.dispatch import CannotStart, Dispatcher, WorkerStatus
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.last_used import LastUsed
from atelier_server.jobs.listing import Listing
from atelier_server.jobs.pins import Pins
from atelier_server.jobs.retention import Retention
from atelier_server.jobs.training_admission import Admission
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.training_runs import TrainingRuns
from atelier_server.jobs.trainings import Trainings
from atelier_server.jobs.uploads import Uploads
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.jobs.watchdog import Watchdog
from atelier_server.messages import Drain, WorkerSettings
from atelier_server.metrics import Metrics, MetricsServer
from atelier_server.preflight import check, open_access
from atelier_server.rpc.health import Health
from atelier_server.rpc.server import address, build_health_server, build_server, listen
from atelier_server.traces import TracingUnavailable, tracer
from atelier_server.workers.handle import DEFAULT_ARGV, LocalWorker

_log = logging.getLogger(__name__)
_CHECKPOINT_SECONDS = 30.0  # for trainings to be written to the store when the server goes
_GRACE_SECONDS = 1.0  # for streams to send their status


class Application:
    """One server. `start`, then `serve` until a drain has ended; `stop` frees everything."""

    def __init__(self, settings: Settings, worker_argv: Sequence[str] = DEFAULT_ARGV) -> None:
        self._settings = settings
        access = open_access(settings)
        self._certificates = access.certificates
        try:
            self._tracer = tracer(settings.otlp_endpoint)
        except TracingUnavailable as error:
            raise StartError(str(error)) from error
        self._directory = DataDirectory(settings.data_dir.absolute())
        root, owner, limits = self._directory.path, self._directory.identity, settings.limits
        self.metrics = Metrics()
        self.metrics.queue_limit("generate", limits.max_queued_generations)
        self.metrics.queue_limit("train", limits.max_queued_trainings)
        self.status = WorkerStatus()
        self.worker = LocalWorker(worker_settings(settings, root, owner), worker_argv)
        self._store = AdapterStore.at(root, settings.store, settings.store_cache_bytes, owner)
        self._uploads = Uploads(root / "uploads", limit=limits.max_uploads)
        self._last_used = LastUsed(root / "last-used.json")
        self._book = Book(root / "atelier.db")
        self._log = TrainingLog(self._book, root / "trainings")
        send = self.worker.send
        self.generations = Generations(send, self.metrics, limit=limits.max_queued_generations)
        self._runs = TrainingRuns(
            self._log,
            self._store,
            send,
            metrics=self.metrics,
            checkpoints=Checkpoints(self._log, self._store, self.metrics, self.generations.needs),
            admission=Admission(
                settings.max_running_trainings, self.status.known_base, lambda: self.status.costs
            ),
        )
        self.trainings = Trainings(
            self._log,
            self._runs,
            self._store,
            limit=limits.max_queued_trainings,
            costs=lambda: self.status.costs,
        )
        self._retention = Retention(self.trainings, seconds=settings.training_retention)
        self._calls = Calls(send)
        self._pins = Pins(
            self._calls, self.metrics, slots=settings.slots, kept_free=limits.max_adapters_per_image
        )
        self._wardrobe = self._build_wardrobe()
        self._dispatcher = self._build_dispatcher()
        self._health = Health()
        self._server = self._build_server(access.identity)
        self._health_server = build_health_server(self._health) if settings.health_port >= 0 else None
        self._metrics_server: MetricsServer | None = None
        self._dispatching: asyncio.Task[None] | None = None
        self._housekeeping: list[asyncio.Task[None]] = []
        self._leave = asyncio.Event()
        self._hurry = asyncio.Event()
        self.port = self.health_port = self.metrics_port = 0

    def _build_wardrobe(self) -> Wardrobe:
        listing = Listing(
            self._store,
            self._last_used,
            self.status.resident,
            retention=self._settings.retention_days * 86400,
            in_host_memory=self.status.in_host_memory,
            pinned=self._pins.pinned,
        )
        return Wardrobe(
            self._store,
            calls=self._calls,
            generations=self.generations,
            trainings=self.trainings,
            uploads=self._uploads,
            metrics=self.metrics,
            listing=listing,
            last_used=self._last_used,
            pins=self._pins,
        )

    def _build_dispatcher(self) -> Dispatcher:
        return Dispatcher(
            self.worker,
            self.status,
            generations=self.generations,
            runs=self._runs,
            calls=self._calls,
            pins=self._pins,
            metrics=self.metrics,
            tracer=self._tracer,
            watchdog=Watchdog(self._settings.stall_seconds),
            changed=self._worker_changed,
        )

    def _build_server(self, identity: Identity) -> grpc.aio.Server:
        return build_server(
            generations=self.generations,
            trainings=self.trainings,
            wardrobe=self._wardrobe,
            craft=Craft(self._wardrobe, self._calls),
            status=self.status,
            settings=self._settings,
            metrics=self.metrics,
            tracer=self._tracer,
            health=self._health,
            identity=identity,
        )

    # -------------------------------------------------------------------------------------------- start
    async def start(self) -> None:
        """Listens, and starts the worker. Raises StartError."""
        settings = self._settings
        await self._health.set_ready(False)
        await asyncio.to_thread(self._uploads.sweep)
        try:
            await asyncio.to_thread(self._store.open)
        except StoreUnavailable as error:
            raise StartError(f"--store: {error.message}") from error
        await self.trainings.sweep()
        await self._retention.remove_orphans()
        self.metrics.stored_checkpoints(await asyncio.to_thread(count_checkpoints, self._store))
        self.port = listen(self._server, settings.host, settings.port, self._certificates)
        if self._health_server is not None:
            self.health_port = listen(self._health_server, settings.host, settings.health_port)
        if settings.metrics_port >= 0:
            try:
                self._metrics_server = MetricsServer(self.metrics, settings.host, settings.metrics_port)
            except OSError as error:
                where = address(settings.host, settings.metrics_port)
                raise StartError(f"cannot serve metrics on {where}: {error.strerror}") from error
            self.metrics_port = self._metrics_server.port
        await self._runs.start()
        await self._server.start()
        if self._health_server is not None:
            await self._health_server.start()
        self._announce()
        self._dispatching = asyncio.create_task(self._dispatcher.run(), name="dispatch")
        for chores in (self._wardrobe, self._retention):
            self._housekeeping.append(asyncio.create_task(chores.keep_house(), name="housekeeping"))

    async def _worker_changed(self) -> None:
        await self._health.set_ready(self.status.ready)
        try:
            self._announce()
        except OSError as error:  # it is for tools, and a full disk passes
            _log.warning("server.json cannot be written: %s", error)

    def _announce(self) -> None:
        self._directory.announce(
            port=self.port,
            metrics_port=self.metrics_port,
            health_port=self.health_port,
            pid=os.getpid(),
            worker_pid=self.worker.pid,
        )

    # --------------------------------------------------------------------------------------------- serve
    def leave(self) -> None:
        """Asks for a drain; asked again, for a fast one."""
        (self._hurry if self._leave.is_set() else self._leave).set()

    async def serve(self) -> None:
        """Until `leave`; then drains. Raises StartError if no worker can be started."""
        if self._dispatching is None:
            raise RuntimeError("start first")
        leaving = asyncio.create_task(self._leave.wait())
        await asyncio.wait((leaving, self._dispatching), return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if self._dispatching.done() and (error := self._dispatching.exception()) is not None:
            if isinstance(error, CannotStart):
                raise StartError(f"the worker cannot start: {error}") from None
            raise error
        await self._drain()

    async def _drain(self) -> None:
        """Pictures in work are finished, trainings are checkpointed; then the worker goes."""
        _log.info("draining: %d generations, %d trainings", self.generations.count, self._runs.count)
        await self._health.drain()
        # Balancers need a moment to see it; until then calls still come, and are served.
        await self._unless_hurried(asyncio.sleep(self._settings.notice_seconds), None)
        self.trainings.draining = True
        self.generations.drain_waiting()
        await self._unless_hurried(self.generations.idle.wait(), self._settings.drain_seconds)
        # From here on the worker's end is no crash.
        self._dispatcher.draining = True
        self.generations.drain_all()
        if self.status.ready:
            self.worker.send(Drain())
            await self._unless_hurried(self._dispatcher.ended.wait(), _CHECKPOINT_SECONDS)
        # What the worker still said is written down before its readers are sent away.
        await self._runs.stop()
        self._log.drain()
        _log.info("drained")

    async def _unless_hurried(self, condition: Coroutine[Any, Any, Any], seconds: float | None) -> None:
        """Waits for `condition`, at most `seconds`, or until somebody asks a second time to leave."""
        tasks = (asyncio.create_task(condition), asyncio.create_task(self._hurry.wait()))
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --------------------------------------------------------------------------------------------- stop
    async def stop(self) -> None:
        """Frees everything, in whatever state it is; trainings stay as they are written."""
        self._dispatcher.draining = True
        tasks = [task for task in (self._dispatching, *self._housekeeping) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.to_thread(self._last_used.write)
        self.worker.kill()
        await self.worker.stop()
        await self._runs.stop()
        self._log.drain()
        await self._server.stop(_GRACE_SECONDS)
        if self._health_server is not None:
            await self._health_server.stop(None)
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        await asyncio.to_thread(self._tracer.close)
        self._book.close()
        self._directory.close()


def worker_settings(settings: Settings, data_dir: Path, owner: str) -> WorkerSettings:
    return WorkerSettings(
        model=settings.model,
        device=settings.device,
        dtype=settings.dtype,
        data_dir=str(data_dir),
        slots=settings.slots,
        threads=settings.threads,
        host_adapter_bytes=settings.host_adapter_bytes,
        compile=settings.compile,
        max_lora_rank=settings.limits.max_lora_rank,
        log_level=settings.log_level,
        log_format=logs.resolve(settings.log_format, sys.stderr),
        store=settings.store,
        store_cache_bytes=settings.store_cache_bytes,
        owner=owner,
        controlnets=settings.controlnets,
        quantize=settings.quantize,
        offload=settings.offload,
        training_share=settings.training_share,
    )


async def run(settings: Settings, worker_argv: Sequence[str] = DEFAULT_ARGV) -> None:
    """One server from start to drain. Raises StartError."""
    check(settings)
    application = Application(settings, worker_argv)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, application.leave)
    try:
        await application.start()
        # What the process was built of stays. Walking it again in every full collection held all calls up.
        gc.freeze()
        port = application.metrics_port
        metrics = f"metrics on {address(settings.host, port)}" if port else "no metrics"
        print(f"atelier listening on {address(settings.host, application.port)} ({metrics})", flush=True)
        await application.serve()
    finally:
        await application.stop()
