"""Trainings on the desk: preparing, stepping, publishing, waiting for their samples."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import monotonic

from atelier_server.core import AdapterUse, GenerationJob, Mode, Recipe, State, TrainingJob
from atelier_server.engine.runner import Published, TrainingRun
from atelier_server.engine.spans import tell
from atelier_server.messages import (
    CheckpointPublished,
    Event,
    ImageReady,
    JobFailed,
    Sample,
    SampleReady,
    TrainingCompleted,
    TrainingProgress,
    TrainingStarted,
    TrainingWarning,
)
from atelier_server.origin import NOWHERE, Origin

_log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 0.1  # seconds between two progress events of a training
SAMPLE_BUCKET = 8  # rows of a sample's forward: strict, so that Generate can give the same picture


@dataclass(frozen=True, slots=True)
class SampleDefaults:
    """What a sample picture has of the base: its size and its scheduler."""

    width: int
    height: int
    scheduler: str
    guidance_scale: float = 7.5


@dataclass(slots=True)
class Training:
    """One training. `preparing` is None once it steps."""

    job: TrainingJob
    run: TrainingRun
    preparing: Iterator[None] | None
    origin: Origin = NOWHERE
    submitted: float = field(default_factory=monotonic)
    began: float = 0.0
    published_at: tuple[int, float] = (0, 0.0)  # step and time
    samples: dict[str, tuple[int, int]] = field(default_factory=dict)  # generation id -> step, prompt index
    last_progress: float = 0.0


class Trainings:
    """All trainings of the worker.

    `emit` takes events; `paint` submits a generation for a sample picture; `ended` is told when a training
    needs no more steps; `unpaint` cancels a sample.
    """

    def __init__(
        self,
        *,
        emit: Callable[[Event], None],
        paint: Callable[[GenerationJob, Origin], None],
        unpaint: Callable[[str], None],
        resting: Callable[[str], None],
        defaults: SampleDefaults,
    ) -> None:
        self._emit, self._paint, self._unpaint, self._resting = emit, paint, unpaint, resting
        self._defaults = defaults
        self.live: dict[str, Training] = {}
        self._by_sample: dict[str, str] = {}

    def begin(self, job: TrainingJob, run: TrainingRun, origin: Origin) -> None:
        self.live[job.id] = Training(job, run, run.prepare(), origin)

    def owns(self, generation_id: str) -> bool:
        """Whether a generation is a sample of a training here."""
        return generation_id in self._by_sample

    # --------------------------------------------------------------------------------------- micro-steps
    def advance(self, training_id: str) -> None:
        """One small piece of device work: a piece of the preparation, or one training step."""
        training = self.live[training_id]
        if training.preparing is not None:
            self._prepare(training)
        elif training.run.step < training.job.recipe.max_train_steps:
            self._step(training)
        if training.preparing is None and training.run.step >= training.job.recipe.max_train_steps:
            self._resting(training_id)
            self._complete_if_sampled(training)

    def _prepare(self, training: Training) -> None:
        assert training.preparing is not None
        try:
            next(training.preparing)
        except StopIteration:
            training.preparing = None
            training.began = monotonic()
            job = training.job
            training.published_at = (training.run.step, training.began)
            self._tell(training, "prepare", training.submitted, training.began)
            _log.info("training from step %d", training.run.step, extra=_about(training))
            self._emit(TrainingStarted(job.id, training.run.step))
            if resumed := training.run.published:
                self._sample(training, resumed)  # those that were lost with the worker

    def _step(self, training: Training) -> None:
        job, recipe = training.job, training.job.recipe
        before = monotonic()
        report = training.run.train_step()
        now = monotonic()
        self._emit(Sample("train_step_seconds", now - before))
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
            self._sample(training, self._publish(training))

    def _publish(self, training: Training) -> Published:
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
            )
        )
        return published

    # ------------------------------------------------------------------------------------------- samples
    def _sample(self, training: Training, published: Published) -> None:
        job, recipe = training.job, training.job.recipe
        step = published.use.checkpoint.step
        for index, prompt in enumerate(recipe.validation_prompts):
            if (step, index) in job.sampled:
                continue
            sample_id = f"{job.id}/sample-{step}-{index}"
            training.samples[sample_id] = (step, index)
            self._by_sample[sample_id] = job.id
            self._paint(self._sample_job(sample_id, prompt, published.use, recipe), training.origin)

    def _sample_job(self, sample_id: str, prompt: str, use: AdapterUse, recipe: Recipe) -> GenerationJob:
        defaults = self._defaults
        return GenerationJob(
            id=sample_id,
            prompt=prompt,
            negative_prompt="",
            adapters=(use,),
            seed=recipe.seed,
            num_images=1,
            num_inference_steps=recipe.validation_steps,
            guidance_scale=defaults.guidance_scale,
            scheduler=defaults.scheduler,
            width=defaults.width,
            height=defaults.height,
            mode=Mode.STRICT,
            bucket=SAMPLE_BUCKET,
        )

    def sample_painted(self, picture: ImageReady) -> None:
        training = self.live[self._by_sample[picture.job_id]]
        step, index = training.samples[picture.job_id]
        prompt = training.job.recipe.validation_prompts[index]
        self._emit(
            SampleReady(training.job.id, step, index, prompt, picture.seed, picture.mime_type, picture.data)
        )

    def sample_ended(self, generation_id: str, failure: JobFailed | None = None) -> None:
        """A sample is painted, or could not be (which is a warning, and no reason to stop)."""
        training = self.live[self._by_sample.pop(generation_id)]
        step, index = training.samples.pop(generation_id)
        if failure is not None:
            message = f"no sample of prompt {index} at step {step}: {failure.message}"
            self._emit(TrainingWarning(training.job.id, "SAMPLE_FAILED", message))
        self._complete_if_sampled(training)

    # ----------------------------------------------------------------------------------------------- end
    def _complete_if_sampled(self, training: Training) -> None:
        finished = training.preparing is None and training.run.step >= training.job.recipe.max_train_steps
        if finished and not training.samples:
            self._end(training, State.SUCCEEDED)

    def cancel(self, training_id: str) -> None:
        """Keeps what was learned so far, and ends the training."""
        training = self.live[training_id]
        self.keep(training_id)
        self._end(training, State.CANCELLED)

    def keep(self, training_id: str) -> None:
        """Publishes the weights of now, where a checkpoint does not have them already."""
        training = self.live[training_id]
        published = training.run.published
        last = published.use.checkpoint.step if published else 0
        if training.preparing is None and training.run.step > last:
            self._publish(training)

    def drop(self, training_id: str) -> None:
        """Stops stepping without an end: the training goes on after the next start of a worker."""
        self._forget(self.live[training_id])

    def fail(self, training_id: str, failure: JobFailed) -> None:
        if training := self.live.get(training_id):
            self._forget(training)
            self._emit(failure)

    def _end(self, training: Training, state: State) -> None:
        seconds = monotonic() - training.began if training.began else 0.0
        _log.info("training %s", state.value, extra={**_about(training), "seconds": round(seconds, 3)})
        self._forget(training)
        self._emit(TrainingCompleted(training.job.id, state, training.run.step, seconds))

    def _forget(self, training: Training) -> None:
        del self.live[training.job.id]
        self._resting(training.job.id)
        for sample_id in list(training.samples):
            del self._by_sample[sample_id]
            self._unpaint(sample_id)

    def _tell(
        self, training: Training, name: str, began: float, ended: float, **attributes: str | int
    ) -> None:
        tell(self._emit, training.origin, name, began, ended, training=training.job.id, **attributes)


def _about(training: Training) -> dict[str, str]:
    """What the log says of a training beside what happened to it."""
    ids = {
        "training": training.job.id,
        "adapter": training.job.name,
        "request_id": training.origin.request_id,
    }
    return {name: value for name, value in ids.items() if value}
