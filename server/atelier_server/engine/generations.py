"""Generations on the desk: their pictures' steps, their timings, their events."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from time import monotonic

from atelier_server.core import GenerationJob
from atelier_server.engine.runner import Decoded
from atelier_server.engine.scheduler import ImageTask
from atelier_server.engine.spans import tell
from atelier_server.messages import (
    Event,
    GenerationCompleted,
    ImageReady,
    PreviewReady,
    Progress,
    Queued,
    Sample,
    Timings,
)
from atelier_server.origin import NOWHERE, Origin

PROGRESS_INTERVAL = 0.1  # seconds between two progress events of a generation


@dataclass(slots=True)
class Generation:
    """One request: its tasks, and how far they are."""

    job: GenerationJob
    tasks: list[ImageTask]
    submitted: float
    origin: Origin = NOWHERE
    total_steps: int = 0
    steps: int = 0
    started: float | None = None  # its texts are being encoded
    opened: float = 0.0  # and are
    first_step: float | None = None
    images_left: int = 0
    position: int | None = None
    last_progress: float = 0.0
    encode_seconds: float = 0.0
    decode_seconds: float = 0.0
    image_encode_seconds: float = 0.0
    denoised: float = 0.0


@dataclass(slots=True)
class Generations:
    """All generations of the worker. `emit` takes events; they may be a training's samples as well."""

    emit: Callable[[Event], None]
    live: dict[str, Generation] = field(default_factory=dict)

    def begin(self, job: GenerationJob, tasks: list[ImageTask], origin: Origin) -> None:
        self.live[job.id] = Generation(job, tasks, monotonic(), origin, images_left=len(tasks))

    def has(self, task: ImageTask) -> bool:
        """Whether it is still wanted. By the task: a class picture's id comes again with its training."""
        generation = self.live.get(task.job.id)
        return generation is not None and task in generation.tasks

    def end(self, job_id: str) -> list[ImageTask]:
        """Forgets a generation; its tasks are to be removed from the scheduler and the runner."""
        generation = self.live.pop(job_id, None)
        return generation.tasks if generation else []

    def tell_positions(self, waiting: list[str]) -> None:
        """A `queued` event for every waiting generation whose position has changed."""
        for position, job_id in enumerate(waiting):
            generation = self.live[job_id]
            if generation.position != position:
                generation.position = position
                self.emit(Queued(job_id, position))

    def opened(self, task: ImageTask, steps: int, seconds: float) -> None:
        """A picture has started: `steps` forwards in all, `seconds` for its texts."""
        generation = self.live[task.job.id]
        now = monotonic()
        if generation.started is None:
            generation.started, generation.opened = now - seconds, now
            self._tell(generation, "queue", generation.submitted, generation.started)
        self._tell(generation, "text_encode", now - seconds, now, image=task.index)
        # Pictures of one request have equally many steps, also those that have not started yet.
        generation.total_steps = steps * task.job.num_images
        generation.encode_seconds += seconds

    def stepped(self, task: ImageTask) -> None:
        generation = self.live[task.job.id]
        now = monotonic()
        if generation.first_step is None:
            generation.first_step = now
            self.emit(Sample("time_to_first_step_seconds", now - generation.submitted))
        generation.steps += 1
        last = generation.steps == generation.total_steps
        if last:
            generation.denoised = now
            self._tell(generation, "denoise", generation.opened, now, steps=generation.total_steps)
        if last or now - generation.last_progress >= PROGRESS_INTERVAL:
            generation.last_progress = now
            self.emit(Progress(task.job.id, generation.steps, generation.total_steps))

    def previewed(self, task: ImageTask, step: int, data: bytes) -> None:
        """A glance at a picture; too late where the picture itself or the generation's end has come."""
        if self.has(task) and not task.decoded:
            self.emit(PreviewReady(task.job.id, task.index, step, "image/png", data))

    def decoded(self, task: ImageTask, picture: Decoded) -> bool:
        """A picture is a file now. True when it was the generation's last."""
        generation = self.live[task.job.id]
        task.decoded = True
        job = generation.job
        generation.decode_seconds += picture.decode.seconds
        generation.image_encode_seconds += picture.encode.seconds
        generation.images_left -= 1
        for name, took in (("decode", picture.decode), ("image_encode", picture.encode)):
            self._tell(generation, name, took.began, took.ended, image=task.index)
        self.emit(Sample("images_total", 1.0))
        self.emit(ImageReady(job.id, task.index, task.seed, job.image_format.mime_type, picture.data))
        if generation.images_left:
            return False
        bucket = max(task.bucket for task in generation.tasks)
        self.emit(GenerationCompleted(job.id, self._timings(generation), bucket))
        return True

    def _tell(
        self, generation: Generation, name: str, began: float, ended: float, **attributes: str | int
    ) -> None:
        tell(self.emit, generation.origin, name, began, ended, job=generation.job.id, **attributes)

    @staticmethod
    def _timings(generation: Generation) -> Timings:
        started = generation.started or generation.submitted
        return Timings(
            queue_seconds=started - generation.submitted,
            encode_seconds=generation.encode_seconds,
            denoise_seconds=generation.denoised - generation.opened,
            decode_seconds=generation.decode_seconds,
            image_encode_seconds=generation.image_encode_seconds,
            total_seconds=monotonic() - generation.submitted,
        )
