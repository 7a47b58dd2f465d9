"""The step loop: schedule, run, emit. One thread owns the device; everything reaches it through the inbox."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic

from atelier_server.core import CheckpointId, GenerationJob, TrainingJob
from atelier_server.engine.aside import Aside, AsideCommand, DeviceWork
from atelier_server.engine.failures import Failures
from atelier_server.engine.generations import Generations
from atelier_server.engine.loading import Loading
from atelier_server.engine.residency import Residency
from atelier_server.engine.runner import Decoded, Runner
from atelier_server.engine.samples import SampleDefaults, Samples
from atelier_server.engine.scheduler import (
    DEFAULT_TRAINING_SHARE,
    DenoiseBatch,
    ImageTask,
    Scheduler,
    TrainStep,
    all_rows,
)
from atelier_server.engine.training_steps import TrainingSteps
from atelier_server.engine.trainings import Trainings
from atelier_server.errors import AtelierError
from atelier_server.messages import (
    AbandonCall,
    AdapterLoaded,
    AdaptersUnloaded,
    Cancel,
    Command,
    DiffAdapters,
    Drain,
    Event,
    ExportAdapter,
    ExtractAdapter,
    ImageReady,
    ImportAdapter,
    JobCancelled,
    LoadAdapter,
    MergeAdapters,
    Pause,
    Sample,
    Span,
    Submit,
    UnloadAdapter,
)
from atelier_server.origin import NOWHERE, Origin

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskDecoded:
    """From the decoder's thread: a picture is a file, or could not be made."""

    task: ImageTask
    picture: Decoded


@dataclass(frozen=True, slots=True)
class TaskPreviewed:
    """From the previewer's thread: a glance at a picture after `step` of its forwards."""

    task: ImageTask
    step: int
    data: bytes


Message = Command | TaskDecoded | TaskPreviewed | DeviceWork


class Loop:
    """Runs until it is drained. `emit` must never block, and may be called from any thread.

    `aside` does what needs files and hardly any device: see `engine.aside`. `clock` tells the seconds that
    pictures and trainings take of the device.
    """

    def __init__(
        self,
        *,
        runner: Runner,
        inbox: SimpleQueue[Message],
        emit: Callable[[Event], None],
        slots: int,
        sample_defaults: SampleDefaults,
        row_limit: Callable[[int, int], int] = all_rows,
        training_share: float = DEFAULT_TRAINING_SHARE,
        aside: Executor | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._runner = runner
        self._clock = clock
        self._inbox = inbox
        self._send = emit
        self._failures = Failures(runner, emit, self._origin)
        failure = self._failures.of_call
        self._aside = Aside(runner=runner, send=emit, ask=inbox.put, failure=failure, executor=aside)
        self.residency = Residency(slots)
        self.scheduler = Scheduler(self.residency, row_limit, training_share)
        self.generations = Generations(self._emit_generation)
        self.samples = Samples(
            emit=emit, paint=self._submit_generation, unpaint=self._drop_generation, defaults=sample_defaults
        )
        self.trainings = Trainings(
            emit=emit,
            samples=self.samples,
            steps=TrainingSteps(runner, self._failures, self.scheduler.shrink_training),
            failure=self._failures.of_training,
            resting=self.scheduler.remove_training,
        )
        # What the heartbeat tells a watchdog: how many steps have begun, and whether there are none to do.
        self.turns = 0
        self.idle = True
        self._draining = False
        self._loading = Loading(self.residency, runner=runner, send=emit, in_use=self._in_use)

    # -------------------------------------------------------------------------------------------- the loop
    def put(self, message: Message) -> None:
        """From any thread. What is done beside the loop begins at once; all else waits for the next step."""
        if isinstance(message, AsideCommand):
            self._aside.submit(message)
        else:
            self._inbox.put(message)

    def run(self) -> None:
        while not (self._draining and not self.generations.live):
            self.turn()
        self._aside.end()
        with suppress(Empty):
            while True:
                if isinstance(message := self._inbox.get_nowait(), DeviceWork):
                    message.refuse()
        self._aside.finish()

    def turn(self) -> None:
        """Takes the messages there are (waiting for one where there is nothing to do), then runs one step."""
        self._receive()
        self.turns += 1
        step = self.scheduler.schedule()
        before = self._clock()
        if isinstance(step, DenoiseBatch):
            self._denoise(step)
        elif isinstance(step, TrainStep):
            self.trainings.advance(step.training_ids)
        if step is not None:
            self.scheduler.spent(step, self._clock() - before)

    def _receive(self) -> None:
        """Takes all messages there are; waits for one where there is nothing else to do."""
        self.idle = not self.scheduler.has_work
        while True:
            try:
                message = self._inbox.get(block=self.idle)
            except Empty:
                return
            self.idle = False
            self._handle(message)

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(job=GenerationJob() as job, origin=origin):
                self._submit_generation(job, origin)
            case Submit(job=TrainingJob() as job, origin=origin):
                self._submit_training(job, origin)
            case Cancel(job_id=job_id):
                self._cancel(job_id)
            case Pause(job_id=job_id):
                if self.trainings.has(job_id):
                    self.trainings.pause(job_id)
            case TaskDecoded(task=task, picture=picture):
                self._decoded(task, picture)
            case TaskPreviewed(task=task, step=step, data=data):
                self.generations.previewed(task, step, data)
            case Drain():
                self._drain()
            case LoadAdapter() | UnloadAdapter():
                self._call(message)
            case AbandonCall(call_id=call_id):
                self._aside.abandon(call_id)
            case ImportAdapter() | ExportAdapter() | MergeAdapters() | ExtractAdapter() | DiffAdapters():
                self._aside.submit(message)
            case DeviceWork():
                message.run()

    # ---------------------------------------------------------------------------------------- generations
    def _submit_generation(self, job: GenerationJob, origin: Origin) -> None:
        self.generations.begin(job, self.scheduler.submit(job), origin)
        self._loading.announce(job.adapters)
        self.generations.tell_positions(list(self.scheduler.waiting_jobs()))

    def _denoise(self, batch: DenoiseBatch) -> None:
        try:
            slots = self._load(batch)
            if slots is None or not self._open(batch, slots):
                return  # a request fell out; the rest is scheduled anew
            before = monotonic()
            finished = self._runner.denoise(batch.tasks, batch.bucket, slots)
        except Exception as error:
            self._batch_failed(batch, error)
            return
        self._send(Sample("denoise_step_seconds", monotonic() - before))
        self._send(Sample("batch_rows", float(len(batch.tasks))))
        for task, last in zip(batch.tasks, finished, strict=True):
            task.buckets.append(batch.bucket)
            self.generations.stepped(task)
            if task.wants_preview and not last:
                self._runner.preview(task, partial(self._put_preview, task, task.steps_done))
        done = [task for task, last in zip(batch.tasks, finished, strict=True) if last]
        if done:
            self.scheduler.remove(done)
            for task in done:
                self._runner.decode(task, partial(self._put_decoded, task))
            self._loading.retire()

    def _put_decoded(self, task: ImageTask, picture: Decoded) -> None:
        self._inbox.put(TaskDecoded(task, picture))

    def _put_preview(self, task: ImageTask, step: int, data: bytes) -> None:
        self._inbox.put(TaskPreviewed(task, step, data))

    def _load(self, batch: DenoiseBatch) -> dict[CheckpointId, int] | None:
        """Slots for the adapters of a batch, loaded. None when one could not be."""
        pinned = frozenset[CheckpointId]().union(*(task.checkpoints for task in batch.tasks))
        slots: dict[CheckpointId, int] = {}
        for use in {use.checkpoint: use for task in batch.tasks for use in task.job.adapters}.values():
            try:
                slots[use.checkpoint] = self._loading.load(use, pinned)
            except AtelierError as error:
                users = {t.job.id for t in self.scheduler.tasks if use.checkpoint in t.checkpoints}
                for job_id in users:
                    self._fail(job_id, error)
                return None
        return slots

    def _open(self, batch: DenoiseBatch, slots: Mapping[CheckpointId, int]) -> bool:
        """Begins the pictures of a batch that are new. False when a request fell out."""
        for task in batch.tasks:
            if task.started:
                continue
            before = monotonic()
            try:
                self._runner.open(task, slots)
            except Exception as error:
                self._fail(task.job.id, self._failures.out_of_memory(error, "generate") or error)
                return False
            task.started = True
            self.generations.opened(task, self._runner.steps(task), monotonic() - before)
        self.generations.tell_positions(list(self.scheduler.waiting_jobs()))
        return True

    def _batch_failed(self, batch: DenoiseBatch, error: Exception) -> None:
        """A step that failed fails the request whose fault it is, and nothing else.

        Its pictures stand where they stood. Out of memory is nobody's fault while the forward can be made
        smaller; where it cannot, those that need the whole forward fail. Of any other error the requests of
        the forward are tried alone.
        """
        failing = {task.job.id for task in batch.tasks}
        if (memory := self._failures.out_of_memory(error, "generate")) is not None:
            error = memory
            if self.scheduler.shrink(batch):
                return
            if strict := {task.job.id for task in batch.tasks if task.job.bucket}:
                failing = strict
        elif self.scheduler.part(batch):
            _log.warning("a forward of %d requests failed; each is tried alone", len(failing), exc_info=error)
            return
        for job_id in failing:
            self._fail(job_id, error)

    def _decoded(self, task: ImageTask, picture: Decoded) -> None:
        live = self.generations.has(task)  # else cancelled or failed meanwhile
        error = picture.error
        if live and error is not None and (memory := self._failures.out_of_memory(error, "generate")):
            if not task.decoded_alone:  # there was a step beside it
                task.decoded_alone = True
                self._runner.decode(task, partial(self._put_decoded, task), alone=True)
                return
            error = memory
        self._runner.close(task)
        if not live:
            return
        if error is not None:
            self._fail(task.job.id, error)
        elif self.generations.decoded(task, picture):
            self.generations.end(task.job.id)
            if self.samples.owns(task.job.id):
                self.trainings.sampled(self.samples.ended(task.job.id))

    def _emit_generation(self, event: Event) -> None:
        """A sample's picture belongs to its training; its other events are nobody's."""
        match event:
            case ImageReady() if self.samples.owns(event.job_id):
                self.samples.painted(event)
            case Sample() | Span():
                self._send(event)
            case _ if not self.samples.owns(getattr(event, "job_id", "")):
                self._send(event)

    def _fail(self, job_id: str, error: Exception) -> None:
        if job_id not in self.generations.live:
            return  # another one's failure took it along
        failure = self._failures.of(job_id, error)
        self._drop_generation(job_id)
        if self.samples.owns(job_id):
            self.trainings.sampled(self.samples.ended(job_id, failure))
        else:
            self._send(failure)

    def _origin(self, job_id: str) -> Origin:
        job = self.generations.live.get(job_id) or self.trainings.live.get(job_id)
        return job.origin if job else NOWHERE

    def _drop_generation(self, job_id: str) -> None:
        tasks = self.generations.end(job_id)
        self.scheduler.remove(tasks)
        for task in tasks:
            self._runner.close(task)
        self._loading.retire()

    # ------------------------------------------------------------------------------------------ trainings
    def _submit_training(self, job: TrainingJob, origin: Origin) -> None:
        if self.trainings.has(job.id) or self.samples.class_images.begin(job, origin):
            return
        try:
            run = self._runner.open_training(job)
        except Exception as error:
            self._send(self._failures.of(job.id, error))
            return
        training = self.trainings.begin(job, run, origin)
        self.scheduler.submit_training(job.id, lambda: training.place, job.priority)

    # ------------------------------------------------------------------------------------- cancel and drain
    def _cancel(self, job_id: str) -> None:
        if self.trainings.has(job_id):
            self.trainings.cancel(job_id)
        elif job_id in self.generations.live:
            self._drop_generation(job_id)
            self._send(JobCancelled(job_id))

    def _drain(self) -> None:
        """Pictures are finished; trainings keep what they have and go on after the next start."""
        self._draining = True
        self.trainings.drain()

    # ---------------------------------------------------------------------------------------- adapter calls
    def _call(self, command: LoadAdapter | UnloadAdapter) -> None:
        try:
            self._send(self._answer(command))
        except Exception as error:
            self._send(self._failures.of_call(command.call_id, error))

    def _answer(self, command: LoadAdapter | UnloadAdapter) -> Event:
        match command:
            case LoadAdapter(call_id=call_id, use=use, pin=pin):
                return AdapterLoaded(call_id, self._loading.ensure(use, pin=pin))
            case UnloadAdapter(call_id=call_id, checkpoints=checkpoints):
                return AdaptersUnloaded(call_id, self._loading.unload(checkpoints))

    def _in_use(self) -> frozenset[CheckpointId]:
        return frozenset[CheckpointId]().union(*(task.checkpoints for task in self.scheduler.tasks))
