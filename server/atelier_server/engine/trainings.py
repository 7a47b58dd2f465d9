"""Trainings on the desk: preparing, stepping, publishing, waiting for their samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import monotonic

from atelier_server.core import State, TrainingJob
from atelier_server.engine.companies import Place
from atelier_server.engine.runner import Published, StepReport, TrainingRun, TrainOutcome
from atelier_server.engine.samples import Samples
from atelier_server.engine.spans import tell
from atelier_server.engine.training_steps import TrainingSteps
from atelier_server.errors import StorageFull
from atelier_server.messages import (
    CheckpointPublished,
    Event,
    JobFailed,
    Sample,
    TrainingCompleted,
    TrainingPaused,
    TrainingProgress,
    TrainingStarted,
)
from atelier_server.origin import NOWHERE, Origin

_log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.1  # seconds between two progress events of a training


@dataclass(slots=True)
class Training:
    """One training. `preparing` is None once it steps; `publishing`, while it takes no steps, is the work on
    a checkpoint; `accumulating`: a step of it is not done yet.
    """

    job: TrainingJob
    run: TrainingRun
    preparing: Iterator[None] | None
    origin: Origin = NOWHERE
    publishing: Iterator[None] | None = None
    submitted: float = field(default_factory=monotonic)
    began: float = 0.0
    published_at: tuple[int, float] = (0, 0.0)  # step and time
    last_progress: float = 0.0
    accumulating: bool = False

    @property
    def finished(self) -> bool:
        """It needs no more steps; its samples may still be painted."""
        at_work = self.preparing is not None or self.publishing is not None
        return not at_work and self.run.step >= self.job.recipe.max_train_steps

    @property
    def place(self) -> Place:
        """In the next micro-step; what prepares or publishes is alone."""
        at_work = self.preparing is not None or self.publishing is not None
        return Place() if at_work else self.run.place


class Trainings:
    """All trainings of the worker.

    `emit` takes events; `failure` says what an error tells the front; `resting` is told when a training needs
    no more steps.
    """

    def __init__(
        self,
        *,
        emit: Callable[[Event], None],
        samples: Samples,
        steps: TrainingSteps,
        failure: Callable[[str, Exception], JobFailed],
        resting: Callable[[str], None],
    ) -> None:
        self._emit, self._failure, self._resting = emit, failure, resting
        self._samples = samples
        self._steps = steps
        self.live: dict[str, Training] = {}

    def has(self, training_id: str) -> bool:
        """Whether it is here, be it for its class pictures."""
        return training_id in self.live or self._samples.class_images.wanted_by(training_id)

    def begin(self, job: TrainingJob, run: TrainingRun, origin: Origin) -> Training:
        training = self.live[job.id] = Training(job, run, run.prepare(), origin)
        return training

    # --------------------------------------------------------------------------------------- micro-steps
    def advance(self, training_ids: Sequence[str]) -> None:
        """One small piece of device work: a piece of one's preparation or checkpoint, or a micro-step of all
        of these.
        """
        trainings = [self.live[training_id] for training_id in training_ids]
        if trainings[0].preparing is not None:
            self._or_stop(trainings[0], self._prepare)
            return
        if trainings[0].publishing is not None:
            self._or_stop(trainings[0], self._go_on_publishing)
            return
        before = monotonic()
        outcomes = self._steps.take([(training.job.id, training.run) for training in trainings])
        self._emit(Sample("train_step_seconds", monotonic() - before))
        for training, outcome in zip(trainings, outcomes, strict=True):
            self._or_stop(training, partial(self._stepped, outcome=outcome))

    def _or_stop(self, training: Training, action: Callable[[Training], None]) -> None:
        try:
            action(training)
        except Exception as error:
            self._stop(training, error)

    def _prepare(self, training: Training) -> None:
        assert training.preparing is not None
        try:
            next(training.preparing)
        except StopIteration:
            training.preparing = None
            training.began = monotonic()
            training.published_at = (training.run.step, training.began)
            self._tell(training, "prepare", training.submitted, training.began)
            _log.info("training from step %d", training.run.step, extra=_about(training))
            self._emit(TrainingStarted(training.job.id, training.run.step))
            if resumed := training.run.published:
                self._paint(training, resumed)  # those that were lost with the worker
            self._rest_if_finished(training)

    def _stepped(self, training: Training, outcome: TrainOutcome) -> None:
        """Raises what came of the micro-step, or of a checkpoint."""
        if isinstance(outcome, Exception):
            raise outcome
        training.accumulating = outcome is None
        if outcome is not None:
            self._report(training, outcome)

    def _report(self, training: Training, report: StepReport) -> None:
        job, recipe, now = training.job, training.job.recipe, monotonic()
        self._emit(Sample("train_steps_total", 1.0))
        step = training.run.step
        publishes = step % recipe.checkpointing_steps == 0 or step == recipe.max_train_steps
        if publishes or now - training.last_progress >= PROGRESS_INTERVAL:
            training.last_progress = now
            done = step - job.resume_step
            left = (recipe.max_train_steps - step) * (now - training.began) / max(done, 1)
            self._emit(
                TrainingProgress(
                    job.id, step, recipe.max_train_steps, report.loss, report.learning_rate, left
                )
            )
        if publishes:
            training.publishing = training.run.publishing()
            self._go_on_publishing(training)

    def _go_on_publishing(self, training: Training) -> None:
        assert training.publishing is not None
        try:
            next(training.publishing)
        except StopIteration:
            self._paint(training, self._publish(training))
            self._rest_if_finished(training)

    def _publish(self, training: Training) -> Published:
        """All at once what is left of it."""
        for _ in training.publishing or training.run.publishing():
            pass
        training.publishing = None
        before = monotonic()
        (from_step, since), step = training.published_at, training.run.step
        self._tell(training, "train", since, before, from_step=from_step, to_step=step)
        published = training.run.publish()
        training.published_at = (step, monotonic())
        self._tell(training, "publish", before, training.published_at[1], step=step)
        _log.info(
            "checkpoint published", extra={**_about(training), "adapter": str(published.use.checkpoint)}
        )
        self._emit(
            CheckpointPublished(
                training.job.id,
                published.use.checkpoint,
                published.use.sha256,
                published.size_bytes,
                published.loss,
                published.validation_loss,
                published.kept_share,
            )
        )
        return published

    def _paint(self, training: Training, published: Published) -> None:
        self._samples.begin(training.job, published.use, training.origin)

    def sampled(self, training_id: str) -> None:
        """A picture of it is painted, or could not be."""
        if training := self.live.get(training_id):
            self._complete_if_sampled(training)

    # ----------------------------------------------------------------------------------------------- end
    def _rest_if_finished(self, training: Training) -> None:
        if training.finished:
            self._resting(training.job.id)
            self._complete_if_sampled(training)

    def _complete_if_sampled(self, training: Training) -> None:
        if training.finished and not self._samples.wanted_by(training.job.id):
            self._end(training, State.SUCCEEDED)

    def cancel(self, training_id: str) -> None:
        """Keeps what was learned so far, and ends the training."""
        if training := self.live.get(training_id):
            self._or_stop(training, self._cancel)
        else:
            step = self._samples.class_images.forget(training_id)
            self._emit(TrainingCompleted(training_id, State.CANCELLED, step, 0.0))

    def pause(self, training_id: str) -> None:
        """Keeps what was learned so far, and frees the device of the training."""
        if training := self.live.get(training_id):
            self._or_stop(training, self._keep_and_pause)
        else:
            self._emit(TrainingPaused(training_id, self._samples.class_images.forget(training_id)))

    def _cancel(self, training: Training) -> None:
        self._keep(training)
        self._end(training, State.CANCELLED)

    def _keep_and_pause(self, training: Training) -> None:
        self._keep(training)
        self._pause(training)

    def drain(self) -> None:
        """All keep what they have; they go on after the next start of a worker."""
        self._samples.class_images.drain()
        for training in list(self.live.values()):
            try:
                self._keep(training)
            except Exception:
                _log.exception("no checkpoint; the training goes on from its last", extra=_about(training))
            self._forget(training)

    def _keep(self, training: Training) -> None:
        """Publishes the weights of now, where a checkpoint does not have them already."""
        published = training.run.published
        if training.preparing is not None or training.run.step <= _step_of(published):
            return
        while training.accumulating:  # there are no weights between two steps but those of the first
            (outcome,) = self._steps.take([(training.job.id, training.run)])
            if isinstance(outcome, Exception):
                raise outcome
            training.accumulating = outcome is None
        self._publish(training)

    def _stop(self, training: Training, error: Exception) -> None:
        """What fails ends; for want of a disk it waits, at its last checkpoint."""
        if isinstance(error, StorageFull):
            self._pause(training, error)
        else:
            failure = self._failure(training.job.id, error)
            self._forget(training)
            self._emit(failure)

    def _pause(self, training: Training, error: StorageFull | None = None) -> None:
        reason, message = (error.reason, error.message) if error else ("", "")
        _log.info("training paused", extra={**_about(training), "reason": reason or "asked"})
        self._forget(training)
        self._emit(TrainingPaused(training.job.id, _step_of(training.run.published), reason, message))

    def _end(self, training: Training, state: State) -> None:
        seconds = monotonic() - training.began if training.began else 0.0
        _log.info("training %s", state.value, extra={**_about(training), "seconds": round(seconds, 3)})
        self._forget(training)
        self._emit(TrainingCompleted(training.job.id, state, training.run.step, seconds))

    def _forget(self, training: Training) -> None:
        del self.live[training.job.id]
        self._resting(training.job.id)
        self._samples.forget(training.job.id)

    def _tell(
        self, training: Training, name: str, began: float, ended: float, **attributes: str | int
    ) -> None:
        tell(self._emit, training.origin, name, began, ended, training=training.job.id, **attributes)


def _step_of(published: Published | None) -> int:
    return published.use.checkpoint.step if published else 0


def _about(training: Training) -> dict[str, str]:
    """What the log says of a training beside what happened to it."""
    ids = {
        "training": training.job.id,
        "adapter": training.job.name,
        "request_id": training.origin.request_id,
    }
    return {name: value for name, value in ids.items() if value}
