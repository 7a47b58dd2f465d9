"""Trainings that have not ended: they are submitted, their events are written, crashes are survived.

Everything that touches a training's record goes through one lane, in the order in which it happened:
worker events, losses of the worker, and the calls of users.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from functools import partial

from atelier_server.adapters.store import AdapterStore, CheckpointRecord
from atelier_server.core import CheckpointId, State, TrainingImage, TrainingJob
from atelier_server.errors import AdapterNotFound, AtelierError, CrashLoop
from atelier_server.jobs import thumbnails
from atelier_server.jobs.lane import TRIES, Lane
from atelier_server.jobs.records import (
    Checkpointed,
    Completed,
    Progressed,
    Restarted,
    Sampled,
    TrainingRecord,
    Warned,
)
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.training_run import Run
from atelier_server.messages import (
    Cancel,
    CheckpointPublished,
    Command,
    JobFailed,
    SampleReady,
    Submit,
    TrainingCompleted,
    TrainingProgress,
    TrainingStarted,
    TrainingWarning,
)
from atelier_server.metrics import Metrics
from atelier_server.origin import NOWHERE, Origin

TrainingEvent = (
    TrainingStarted
    | TrainingProgress
    | CheckpointPublished
    | SampleReady
    | TrainingWarning
    | TrainingCompleted
    | JobFailed
)
_CRASHES = 3
_log = logging.getLogger(__name__)


class TrainingRuns:
    """`send` hands a command to the worker; it never blocks. `lane` orders all that happens."""

    def __init__(
        self, log: TrainingLog, store: AdapterStore, send: Callable[[Command], None], metrics: Metrics
    ) -> None:
        self._log = log
        self._book = log.book
        self._store = store
        self._send = send
        self._metrics = metrics
        self._runs: dict[str, Run] = {}
        self.lane = Lane()
        self._ready = False

    async def start(self) -> None:
        """Takes up what a former server left unfinished."""
        await self._book.do(self._book.interrupt_running, "SERVER_RESTARTED")
        for record in await self._book.do(self._book.unfinished):
            self._runs[record.id] = self._run(record)
        await self._count()
        self.lane.start()

    async def stop(self) -> None:
        """Writes down what has come, then ends. Idempotent."""
        for run in self._runs.values():
            run.flush()
        await self.lane.stop()

    def knows(self, training: str) -> bool:
        return training in self._runs

    def writes(self, adapter: str, version: int | None) -> bool:
        """Whether an unfinished training writes that adapter, or that version of it."""
        return any(r.adapter == adapter and version in (None, r.version) for r in tuple(self._runs.values()))

    @property
    def count(self) -> int:
        return len(self._runs)

    def count_of(self, owns: Callable[[str], bool]) -> int:
        """How many unfinished trainings write adapters whose names `owns` says are its own."""
        return sum(owns(run.adapter) for run in self._runs.values())

    # ------------------------------------------------------------------------------------------- inputs
    def handle(self, event: TrainingEvent) -> None:
        """An event of the worker."""
        run = self._runs.get(event.job_id)
        if run is None:
            return
        if isinstance(event, TrainingProgress):
            run.progress(event)
            return
        if isinstance(event, TrainingStarted):
            run.started, run.step = True, event.from_step
        run.flush()
        ends = isinstance(event, TrainingCompleted | JobFailed)
        self.lane.put(partial(self._write, run, event), tries=None if ends else TRIES)

    def worker_ready(self) -> None:
        self.lane.put(self._submit_all)

    def worker_lost(self, blameless: bool) -> None:
        """`blameless`: a generation on its last try is known to have been at work; nobody is counted."""
        # At once: what the lane does before `_interrupted` must not hand anything to the next worker.
        self._ready = False
        for run in self._runs.values():
            run.flush()
        self.lane.put(partial(self._interrupted, blameless))

    async def add(self, record: TrainingRecord, origin: Origin) -> None:
        """A training that has just been written down or queued again."""
        run = self._runs[record.id] = self._run(record, origin)
        await self._count()
        if self._ready:
            await self._submit(run)

    def _run(self, record: TrainingRecord, origin: Origin = NOWHERE) -> Run:
        return Run(record.id, record.adapter, record.version, record.step, self._show, origin=origin)

    def _show(self, run: Run, event: TrainingProgress) -> None:
        self.lane.put(partial(self._write, run, event), tries=1)

    async def cancel(self, training: str) -> None:
        """Call in the lane. A training that no worker has is ended here."""
        await self._book.do(self._book.update, training, cancel_requested=True)
        run = self._runs[training]
        if run.submitted:
            self._send(Cancel(training))
        else:
            await self._end(run, State.CANCELLED)

    # ----------------------------------------------------------------------------------------- the lane
    async def _write(self, run: Run, event: TrainingEvent) -> None:
        match event:
            case TrainingStarted():
                await self._begin(run)
            case TrainingProgress():
                payload = Progressed(
                    event.step, event.max_train_steps, event.loss, event.learning_rate, event.seconds_left
                )
                loss = None if math.isnan(event.loss) else event.loss
                await self._log.append(run.id, payload, step=event.step, loss=loss)
            case CheckpointPublished():
                adapter = f"{run.adapter}@{event.checkpoint.step}"
                checkpoint = Checkpointed(
                    event.checkpoint.step,
                    adapter,
                    event.sha256,
                    event.size_bytes,
                    event.loss,
                    event.validation_loss,
                    event.kept_share,
                )
                await self._checkpoint(run, checkpoint)
            case SampleReady():
                file = await self._log.keep_sample(
                    run.id, event.step, event.index, event.mime_type, event.data
                )
                sample = Sampled(event.step, event.index, event.prompt, event.seed, event.mime_type, file)
                await self._log.append(run.id, sample)
                if event.index == 0:
                    painted = CheckpointId(run.adapter, run.version, event.step)
                    await asyncio.to_thread(thumbnails.keep, self._store, painted, event.data)
            case TrainingWarning():
                await self._log.append(run.id, Warned(event.reason, event.message))
            case TrainingCompleted():
                run.step = event.step
                await self._end(run, event.state, seconds=event.seconds)
            case JobFailed():
                error = (event.reason, event.message, event.metadata)
                await self._end(run, State.FAILED, error=error)

    async def _begin(self, run: Run) -> None:
        record = await self._book.do(self._book.training, run.id)
        if record is not None and record.last_seq == 1:
            self._metrics.work_began("train", max(0.0, time.time() - record.create_time))
        await self._book.do(self._book.update, run.id, state=State.RUNNING)
        await self._count()

    async def _checkpoint(self, run: Run, payload: Checkpointed) -> None:
        if payload.step in run.checkpoints:
            return
        await self._log.append(run.id, payload, step=payload.step)
        run.checkpoints.add(payload.step)
        self._metrics.checkpoint_stored()

    async def _end(
        self,
        run: Run,
        state: State,
        *,
        seconds: float | None = None,
        error: tuple[str, str, tuple[tuple[str, str], ...]] = ("", "", ()),
    ) -> None:
        await self._reconcile(run)
        record = await self._book.do(self._book.training, run.id)
        last = await asyncio.to_thread(self._store.last_checkpoint, run.adapter, run.version)
        now = time.time()
        if seconds is None:
            seconds = max(0.0, now - record.create_time) if record else 0.0
        reason, message, metadata = error
        adapter = str(last.id) if last else ""
        payload = Completed(state, run.step, adapter, seconds, reason, message, metadata)
        changes = {"reason": reason, "message": message, "metadata": dict(metadata)}
        await self._log.append(
            run.id, payload, state=state, step=run.step, end_time=now, interruption="", **changes
        )
        self._runs.pop(run.id, None)
        ids = {"training": run.id, "adapter": run.adapter, "request_id": run.origin.request_id}
        _log.info("training ended: %s", state.value, extra={**ids, "reason": reason or "none"})
        await self._count()
        self._metrics.stored_checkpoints(await asyncio.to_thread(count_checkpoints, self._store))

    # ----------------------------------------------------------------------------- submission and crashes
    async def _submit_all(self) -> None:
        self._ready = True
        for run in list(self._runs.values()):
            if not run.submitted:
                try:
                    await self._submit(run)
                except AtelierError as error:
                    await self._end(run, State.FAILED, error=(error.reason, error.message, ()))

    async def _submit(self, run: Run) -> None:
        record = await self._book.do(self._book.training, run.id)
        if record is None:
            self._runs.pop(run.id, None)
            return
        await self._reconcile(run)
        last = await asyncio.to_thread(self._store.last_checkpoint, run.adapter, run.version)
        run.step = last.id.step if last else 0
        if record.cancel_requested:
            await self._end(run, State.CANCELLED)
            return
        if record.interruption:
            restarted = Restarted(run.step, record.interruption)
            await self._log.append(run.id, restarted, step=run.step, interruption="")
        images = self._log.folder(run.id) / "images"
        sampled = await self._book.do(self._book.events_of, run.id, "sample")
        job = TrainingJob(
            id=run.id,
            name=run.adapter,
            version=run.version,
            recipe=record.recipe,
            images=tuple(TrainingImage(str(images / p.file), p.caption) for p in record.images),
            resume_step=run.step,
            sampled=frozenset(
                (e.payload.step, e.payload.index) for e in sampled if isinstance(e.payload, Sampled)
            ),
        )
        run.submitted = True
        self._send(Submit(job, run.origin))

    async def _reconcile(self, run: Run) -> None:
        """Checkpoints that reached the store while their event was lost on the way are written first."""
        logged = await self._book.do(self._book.events_of, run.id, "checkpoint")
        run.checkpoints = {e.payload.step for e in logged if isinstance(e.payload, Checkpointed)}
        for kept in await asyncio.to_thread(_checkpoints_of, self._store, run.adapter, run.version):
            loss = math.nan if kept.loss is None else kept.loss
            adapter, facts = f"{run.adapter}@{kept.id.step}", (kept.validation_loss, kept.kept_share)
            payload = Checkpointed(kept.id.step, adapter, kept.sha256, kept.size_bytes, loss, *facts)
            await self._checkpoint(run, payload)

    async def _interrupted(self, blameless: bool) -> None:
        """The worker has gone. Blamed are the trainings that ran, or the one that was being prepared."""
        self._ready = False
        lost = [run for run in self._runs.values() if run.submitted]
        running = [run for run in lost if run.started]
        blamed = [] if blameless else running or lost[:1]
        for run in lost:
            run.submitted = False
            record = await self._book.do(self._book.training, run.id)
            if record is None:
                continue
            count = record.crash_count
            if run in blamed:
                count = count + 1 if record.crash_step == run.step else 1
                await self._book.do(self._book.update, run.id, crash_step=run.step, crash_count=count)
            if run in blamed and count >= _CRASHES:
                message = f"the worker died {count} times at step {run.step} of {run.id}"
                await self._end(
                    run, State.FAILED, error=(CrashLoop.reason, message, (("step", str(run.step)),))
                )
                continue
            reason = "WORKER_LOST" if run.started else record.interruption
            await self._book.do(self._book.update, run.id, state=State.QUEUED, interruption=reason)
            run.started = False
        await self._count()

    async def _count(self) -> None:
        counts = await self._book.do(self._book.count_states)
        self._metrics.training_states(counts)
        self._metrics.queue_depth("train", counts.get(State.QUEUED, 0))


def count_checkpoints(store: AdapterStore) -> int:
    """How many checkpoints the store holds."""
    return sum(len(version.checkpoints) for version in store.versions())


def _checkpoints_of(store: AdapterStore, name: str, version: int) -> tuple[CheckpointRecord, ...]:
    try:
        return store.version(name, version).checkpoints
    except AdapterNotFound:
        return ()  # deleted by hand: the training starts again from nothing, or the worker refuses it
