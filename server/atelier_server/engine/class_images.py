"""Class pictures of prior preservation: what the base itself paints for the class, before a training begins.

They are pictures like any others, in batches with them. The front keeps them and submits the training again
once all are painted, so that it never begins with pictures that the next worker would not find.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from atelier_server.core import GenerationJob, TrainingJob
from atelier_server.messages import ClassImageReady, Event, ImageReady, JobFailed, TrainingPaused
from atelier_server.origin import Origin


@dataclass(frozen=True, slots=True)
class _ClassImage:
    job: TrainingJob
    number: int


class ClassImages:
    """`paint` submits a generation, `unpaint` cancels one, `emit` takes events. `picture` makes a generation
    of its id, prompt, seed and number of steps.
    """

    def __init__(
        self,
        *,
        emit: Callable[[Event], None],
        paint: Callable[[GenerationJob, Origin], None],
        unpaint: Callable[[str], None],
        picture: Callable[[str, str, int, int], GenerationJob],
    ) -> None:
        self._emit, self._paint, self._unpaint, self._picture = emit, paint, unpaint, picture
        self._open: dict[str, _ClassImage] = {}  # by generation

    def owns(self, generation_id: str) -> bool:
        """Whether a generation is a class picture."""
        return generation_id in self._open

    def wanted_by(self, training_id: str) -> bool:
        """Whether a training waits for any."""
        return any(image.job.id == training_id for image in self._open.values())

    def begin(self, job: TrainingJob, origin: Origin) -> bool:
        """Paints those that a training needs and does not have; whether there are any."""
        missing = missing_of(job)
        recipe = job.recipe
        for number in missing:
            name = f"{job.id}/class-{number}"
            self._open[name] = _ClassImage(job, number)
            seed = recipe.seed + number
            self._paint(self._picture(name, recipe.class_prompt, seed, recipe.validation_steps), origin)
        return bool(missing)

    def painted(self, picture: ImageReady) -> None:
        image = self._open[picture.job_id]
        self._emit(ClassImageReady(image.job.id, image.number, picture.mime_type, picture.data))

    def ended(self, generation_id: str, failure: JobFailed | None = None) -> str:
        """One is painted, or could not be, which fails its training; the training's id."""
        job = self._open.pop(generation_id).job
        if failure is not None:
            self.forget(job.id)
            message = f"a class picture could not be painted: {failure.message}"
            self._emit(JobFailed(job.id, failure.reason, message, failure.metadata))
        elif not self.wanted_by(job.id):
            self._emit(TrainingPaused(job.id, job.resume_step))
        return job.id

    def forget(self, training_id: str) -> int:
        """Cancels those of a training; the step that it would have gone on from."""
        step = 0
        for name in [name for name, image in self._open.items() if image.job.id == training_id]:
            step = self._open.pop(name).job.resume_step
            self._unpaint(name)
        return step

    def drain(self) -> None:
        for training_id in {image.job.id for image in self._open.values()}:
            self.forget(training_id)


def missing_of(job: TrainingJob) -> list[int]:
    """The numbers of the class pictures that are not painted yet."""
    if not job.recipe.with_prior_preservation:
        return []
    there = {number for number, _ in job.class_images}
    return [number for number in range(job.recipe.num_class_images) if number not in there]
