"""Trainings that have not ended: they are submitted, their events are written, crashes are survived.

Everything that touches a training's record goes through one lane, in the order in which it happened:
worker events, losses of the worker, and the calls of users.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from functools import partial

from atelier_server.adapters.store import AdapterStore
from atelier_server.core import State
from atelier_server.errors import AtelierError, CrashLoop, StorageFull
from atelier_server.jobs.checkpoints import Checkpoints
from atelier_server.jobs.lane import TRIES, Lane
from atelier_server.jobs.records import (
    Completed,
    Progressed,
    Restarted,
    TrainingRecord,
    Warned,
)
from atelier_server.jobs.training_admission import Admission
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.training_run import SUSPECT_CRASHES, Run
from atelier_server.messages import (
    Cancel,
    CheckpointPublished,
    ClassImageReady,
    Command,
    JobFailed,
    Pause,
    SampleReady,
    Submit,
    TrainingCompleted,
    TrainingPaused,
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
    | ClassImageReady
    | SampleReady
    | TrainingWarning
    | TrainingPaused
    | TrainingCompleted
    | JobFailed
)
_CRASHES = SUSPECT_CRASHES + 1
_log = logging.getLogger(__name__)


class TrainingRuns:
    """`send` hands a command to the worker; it never blocks. `lane` orders all that happens."""

    def __init__(
        self,
        log: TrainingLog,
        store: AdapterStore,
        send: Callable[[Command], None],
        *,
        metrics: Metrics,
        checkpoints: Checkpoints,
        admission: Admission,
    ) -> None:
        self._log = log
        self._book = log.book
        self._store = store
        self._send = send
        self._metrics = metrics
        self._checkpoints = checkpoints
        self.admission = admission
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
            if run.suspect and event.step > run.crash_step:
                run.suspect = False
                self.lane.put(partial(self._acquitted, run))
            return
        if isinstance(event, TrainingStarted):
            run.started, run.step = True, event.from_step
        run.flush()
        # A class picture that is lost would be painted, and lost, again.
        waits = isinstance(event, ClassImageReady | TrainingPaused | TrainingCompleted | JobFailed)
        self.lane.put(partial(self._write, run, event), tries=None if waits else TRIES)

    def worker_ready(self) -> None:
        self.lane.put(self._open)

    def worker_lost(self, blameless: bool) -> None:
        """`blameless`: a generation on its last try is known to have been at work; nobody is counted."""
        # At once: what the lane does before `_interrupted` must not hand anything to the next worker.
        self._ready = False
        for run in self._runs.values():
            run.flush()
        self.lane.put(partial(self._interrupted, blameless))

    async def add(self, record: TrainingRecord, origin: Origin) -> None:
        """A training that has just been written down or queued again."""
        self._runs[record.id] = self._run(record, origin)
        await self._count()
        self.lane.put(self._submit_all)

    def _run(self, record: TrainingRecord, origin: Origin = NOWHERE) -> Run:
        return Run(record, self._show, origin=origin)

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

    async def pause(self, training: str) -> None:
        """Call in the lane. From here on it is paused, whatever happens to the worker."""
        run = self._runs[training]
        await self._book.do(self._book.update, training, state=State.PAUSED)
        run.paused = True
        await self._count()
        if run.submitted:
            self._send(Pause(training))
        else:
            await self._log.append(run.id, _paused_at(run.step))

    async def resume(self, training: str) -> None:
        """Call in the lane, for one that is paused. What the worker still has goes on once it has left."""
        run = self._runs[training]
        await self._book.do(self._book.requeue, training)
        run.paused = run.suspect = False
        await self._count()
        self.lane.put(self._submit_all)

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
                await self._checkpoints.published(run, event)
                await self._checkpoints.prune(run)
            case ClassImageReady():
                await self._log.keep_class_image(run.id, event.number, event.mime_type, event.data)
            case SampleReady():
                await self._checkpoints.painted(run, event)
            case TrainingWarning():
                await self._log.append(run.id, Warned(event.reason, event.message))
            case TrainingPaused():
                await self._left(run, event)
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
        if not run.paused:
            await self._book.do(self._book.update, run.id, state=State.RUNNING)
            await self._count()

    async def _left(self, run: Run, event: TrainingPaused) -> None:
        """The worker has it no more: it waits for its user, for a disk, or only for another one's turn."""
        run.submitted = run.started = False
        run.step = event.step
        if event.reason:
            run.paused = True
            reason = {"reason": event.reason, "message": event.message}
            told = Warned(event.reason, f"{event.message}; {_paused_at(run.step).message}")
            await self._log.append(run.id, told, state=State.PAUSED, step=run.step, **reason)
        elif run.paused:
            await self._log.append(run.id, _paused_at(run.step), step=run.step)
        else:
            await self._book.do(self._book.update, run.id, state=State.QUEUED)
        record = await self._book.do(self._book.training, run.id)
        if record is not None and record.cancel_requested:
            await self._end(run, State.CANCELLED)
        await self._count()
        self.lane.put(self._submit_all)

    async def _end(
        self,
        run: Run,
        state: State,
        *,
        seconds: float | None = None,
        error: tuple[str, str, tuple[tuple[str, str], ...]] = ("", "", ()),
    ) -> None:
        await self._checkpoints.reconcile(run)
        await self._checkpoints.prune(run)
        record = await self._book.do(self._book.training, run.id)
        last = await self._checkpoints.last(run)
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
        await self._checkpoints.count()
        self.lane.put(self._submit_all)

    # ----------------------------------------------------------------------------- submission and crashes
    async def _open(self) -> None:
        self._ready = True
        await self._submit_all()

    async def _submit_all(self) -> None:
        """Those whose turn it is."""
        while self._ready and (run := self.admission.next(self._runs.values())) is not None:
            try:
                await self._submit(run)
            except StorageFull:
                raise  # tried again
            except AtelierError as error:
                await self._end(run, State.FAILED, error=(error.reason, error.message, ()))

    async def _acquitted(self, run: Run) -> None:
        """It has passed where the worker died; the next suspect has its turn, and then all that wait."""
        if run.submitted and any(other.suspect and not other.paused for other in self._runs.values()):
            self._send(Pause(run.id))
        else:
            await self._submit_all()

    async def _submit(self, run: Run) -> None:
        record = await self._book.do(self._book.training, run.id)
        if record is None:
            self._runs.pop(run.id, None)
            return
        await self._checkpoints.reconcile(run)
        last = await self._checkpoints.last(run)
        run.step = last.id.step if last else 0
        if record.cancel_requested:
            await self._end(run, State.CANCELLED)
            return
        if record.interruption:
            restarted = Restarted(run.step, record.interruption)
            await self._log.append(run.id, restarted, step=run.step, interruption="")
        job = await self._log.job(record, run.step)
        run.submitted = True
        self._send(Submit(job, run.origin))

    async def _interrupted(self, blameless: bool) -> None:
        """The worker has gone. Any of the trainings that it had may have been the reason."""
        for run in [run for run in self._runs.values() if run.submitted]:
            was_running, run.submitted, run.started = run.started, False, False
            record = await self._book.do(self._book.training, run.id)
            if record is None:
                continue
            if not blameless and await self._blamed(run, record) >= _CRASHES:
                message = f"the worker died {_CRASHES} times at step {run.step} of {run.id}"
                await self._end(
                    run, State.FAILED, error=(CrashLoop.reason, message, (("step", str(run.step)),))
                )
                continue
            reason = "WORKER_LOST" if was_running else record.interruption
            state = State.PAUSED if run.paused else State.QUEUED
            await self._book.do(self._book.update, run.id, state=state, interruption=reason)
        await self._count()

    async def _blamed(self, run: Run, record: TrainingRecord) -> int:
        """How many crashes in a row it has been there for, at one step; with some it is a suspect."""
        count = record.crash_count + 1 if record.crash_step == run.step else 1
        await self._book.do(self._book.update, run.id, crash_step=run.step, crash_count=count)
        run.crash_step, run.suspect = run.step, count >= SUSPECT_CRASHES
        return count

    async def _count(self) -> None:
        counts = await self._book.do(self._book.count_states)
        self._metrics.training_states(counts)
        self._metrics.queue_depth("train", counts.get(State.QUEUED, 0))


def _paused_at(step: int) -> Warned:
    return Warned("PAUSED", f"paused at step {step}; resume it to go on")
