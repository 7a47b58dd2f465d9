"""Between the worker and the rooms of the book: keeps one worker alive and hands its events round."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from atelier_server.core import ROW_BUCKETS, BaseInfo, CheckpointId, Costs, GenerationJob
from atelier_server.errors import OutOfMemory, WorkerNotReady
from atelier_server.jobs.calls import Calls
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.pins import Pins
from atelier_server.jobs.training_runs import TrainingRuns
from atelier_server.jobs.watchdog import Watchdog
from atelier_server.messages import (
    AdapterExported,
    AdapterImported,
    AdapterLoaded,
    AdapterMade,
    AdaptersDiffed,
    AdaptersUnloaded,
    CallFailed,
    CallProgress,
    CheckpointPublished,
    ClassImageReady,
    Event,
    GenerationCompleted,
    Heartbeat,
    ImageReady,
    JobCancelled,
    JobFailed,
    PreviewReady,
    Progress,
    Queued,
    Sample,
    SampleReady,
    Span,
    TrainingCompleted,
    TrainingPaused,
    TrainingProgress,
    TrainingStarted,
    TrainingWarning,
    WorkerFailed,
    WorkerLost,
    WorkerReady,
)
from atelier_server.metrics import Metrics
from atelier_server.traces import Tracer
from atelier_server.workers.handle import WorkerHandle

_log = logging.getLogger(__name__)
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0
_FIRST_STARTS = 3


class CannotStart(Exception):
    """No worker has ever been ready, and none will be; the message says why."""


@dataclass(slots=True)
class WorkerStatus:
    """What is known of the worker. `base` stays when the worker is lost: the next has the same."""

    ready: bool = False
    message: str = "the worker is starting"
    base: BaseInfo | None = None
    slots: int = 0
    restarts: int = 0
    heartbeat: Heartbeat | None = None
    costs: Costs = field(default_factory=Costs)

    def known_base(self) -> BaseInfo:
        """Raises WorkerNotReady until a worker has told its base model."""
        if self.base is None:
            raise WorkerNotReady(self.message)
        return self.base

    def least_seconds(self, job: GenerationJob) -> float:
        """What a generation takes on an idle device at the very least: half of what its forwards would take
        if each cost no more than the smallest, measured at the start."""
        base = self.known_base()
        larger = job.width * job.height / (base.native_width * base.native_height)
        forwards = -(-job.num_images * job.rows_per_image // ROW_BUCKETS[-1]) * job.steps
        return 0.5 * forwards * ROW_BUCKETS[0] * self.costs.row_seconds * larger

    def check_memory(self, job: GenerationJob) -> None:
        """Raises OutOfMemory for a picture that does not fit the device even alone."""
        rows = job.bucket or ROW_BUCKETS[0]
        needed, free = self.costs.forward_bytes(rows, job.width, job.height), self.costs.free_bytes
        if free and needed > free:
            raise OutOfMemory(
                f"{rows} rows of {job.width} x {job.height} need {needed} bytes, and the device has {free}: "
                "ask for a smaller size" + (" or batch_bucket" if rows > ROW_BUCKETS[0] else ""),
                {"needed_bytes": str(needed), "free_bytes": str(free)},
            )

    def in_host_memory(self) -> frozenset[str]:
        """The digests of the adapter files that the worker holds beside its slots."""
        return self.heartbeat.host_contents if self.heartbeat else frozenset()

    def resident(self) -> frozenset[CheckpointId]:
        return frozenset(self.heartbeat.resident) if self.heartbeat else frozenset()


class Dispatcher:
    """`changed` is awaited whenever readiness or the worker's process changes."""

    def __init__(
        self,
        worker: WorkerHandle,
        status: WorkerStatus,
        *,
        generations: Generations,
        runs: TrainingRuns,
        calls: Calls,
        pins: Pins,
        metrics: Metrics,
        tracer: Tracer,
        watchdog: Watchdog,
        changed: Callable[[], Awaitable[None]],
    ) -> None:
        self._worker = worker
        self._status = status
        self._generations = generations
        self._runs = runs
        self._calls = calls
        self._pins = pins
        self._metrics = metrics
        self._tracer = tracer
        self._watchdog = watchdog
        self._watching: asyncio.Task[None] | None = None
        self._stalled = False
        self._changed = changed
        self.draining = False
        self.ended = asyncio.Event()

    async def run(self) -> None:
        """Keeps a worker until the drain. Raises CannotStart if the first never gets ready."""
        failures = 0
        while True:
            try:
                await self._worker.start()
            except OSError as error:
                failures += 1
                self._status.message = f"the worker cannot be started: {error}"
                _log.error("%s", self._status.message)
            else:
                await self._changed()
                failures = 0 if await self._follow() else failures + 1
            if self.draining:
                break
            if self._status.base is None and failures >= _FIRST_STARTS:
                raise CannotStart(f"the worker died {failures} times before it was ready")
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**failures)
            _log.warning("the worker is started again in %.1f s", pause)
            await asyncio.sleep(pause)
            self._status.restarts += 1
        self.ended.set()

    async def _follow(self) -> bool:
        """Hands round what one worker says until it is lost; whether it has been ready."""
        was_ready = False
        async for event in self._worker.events():
            match event:
                case WorkerReady():
                    was_ready = True
                    await self._ready(event)
                case WorkerLost():
                    await self._gone(event)
                case WorkerFailed():
                    self._status.message = event.message
                    _log.error("the worker cannot start: %s: %s", event.reason, event.message)
                    if self._status.base is None:
                        raise CannotStart(f"{event.reason}: {event.message}")
                case _:
                    self._route(event)
        return was_ready

    async def _ready(self, event: WorkerReady) -> None:
        status = self._status
        status.ready, status.message = True, ""
        status.base, status.slots, status.costs = event.base, event.slots, event.costs
        _log.info("the worker is ready: %s on %s", event.base.reference, event.base.device)
        self._watchdog.begin()
        self._watching = asyncio.create_task(self._watch(), name="watchdog")
        self._metrics.worker_ready()
        self._calls.worker_ready()
        self._pins.worker_ready()
        self._generations.worker_ready()
        self._runs.worker_ready()
        await self._changed()

    async def _gone(self, event: WorkerLost) -> None:
        self._status.ready, self._status.heartbeat = False, None
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        stalled, self._stalled = self._stalled, False
        self._metrics.worker_gone(self._status.base)
        self._calls.worker_lost()
        if self.draining:
            # It has done as it was told. Its trainings stay as written; the next server goes on with them.
            self._status.message = "the server is going away"
        else:
            self._status.message = "the worker was lost and is being started again"
            _log.error("the worker was lost (exit code %s)", event.exit_code)
            self._metrics.worker_lost(event.exit_code, stalled=stalled)
            self._runs.worker_lost(blameless=self._generations.worker_lost())
        await self._changed()

    async def _watch(self) -> None:
        """Ends a worker that lives and gets nowhere; what it had is done again, as after a crash."""
        while True:
            await asyncio.sleep(self._watchdog.look_seconds)
            if why := self._watchdog.stalled():
                _log.error("the worker is ended: %s", why)
                self._stalled = True
                self._worker.kill()
                return

    def _route(self, event: Event) -> None:
        match event:
            case (
                Queued() | Progress() | PreviewReady() | ImageReady() | GenerationCompleted() | JobCancelled()
            ):
                self._generations.handle(event)
            case JobFailed():
                room = self._generations if self._generations.knows(event.job_id) else self._runs
                room.handle(event)
            case TrainingStarted() | TrainingProgress() | CheckpointPublished() | ClassImageReady():
                self._runs.handle(event)
            case SampleReady() | TrainingWarning() | TrainingPaused() | TrainingCompleted():
                self._runs.handle(event)
            case AdapterLoaded() | AdaptersUnloaded() | AdapterImported() | AdapterExported():
                self._calls.handle(event)
            case AdapterMade() | AdaptersDiffed() | CallProgress() | CallFailed():
                self._calls.handle(event)
            case Heartbeat():
                self._status.heartbeat = event
                self._watchdog.heard(event)
                if self._status.base is not None:
                    self._metrics.heartbeat(event, self._status.base)
            case Sample():
                self._metrics.observe(event)
            case Span():
                self._tracer.finished(event)
            case _:
                _log.error("nobody knows what to do with %s", type(event).__name__)
