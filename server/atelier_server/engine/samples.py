"""Sample pictures of trainings: generations with a checkpoint, whose pictures belong to the training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from atelier_server.core import AdapterUse, GenerationJob, Mode, Priority, TrainingJob
from atelier_server.engine.class_images import ClassImages
from atelier_server.messages import Event, ImageReady, JobFailed, SampleReady, TrainingWarning
from atelier_server.origin import Origin

SAMPLE_BUCKET = 8  # rows of a sample's forward: strict, so that Generate can give the same picture


@dataclass(frozen=True, slots=True)
class SampleDefaults:
    """What a sample picture has of the base: its size and its scheduler."""

    width: int
    height: int
    scheduler: str
    guidance_scale: float = 7.5


@dataclass(frozen=True, slots=True)
class _Sample:
    job: TrainingJob
    step: int
    index: int


class Samples:
    """`paint` submits a generation, `unpaint` cancels one, `emit` takes events."""

    def __init__(
        self,
        *,
        emit: Callable[[Event], None],
        paint: Callable[[GenerationJob, Origin], None],
        unpaint: Callable[[str], None],
        defaults: SampleDefaults,
    ) -> None:
        self._emit, self._paint, self._unpaint = emit, paint, unpaint
        self._defaults = defaults
        self._open: dict[str, _Sample] = {}  # by generation
        self.class_images = ClassImages(emit=emit, paint=paint, unpaint=unpaint, picture=self._picture)

    def owns(self, generation_id: str) -> bool:
        """Whether a generation is a training's: a sample, or a class picture."""
        return generation_id in self._open or self.class_images.owns(generation_id)

    def wanted_by(self, training_id: str) -> bool:
        """Whether a training waits for a sample."""
        return any(sample.job.id == training_id for sample in self._open.values())

    def begin(self, job: TrainingJob, use: AdapterUse, origin: Origin) -> None:
        """Paints the prompts of a checkpoint, but those that are kept already."""
        step = use.checkpoint.step
        for index, prompt in enumerate(job.recipe.validation_prompts):
            if (step, index) not in job.sampled:
                sample_id = f"{job.id}/sample-{step}-{index}"
                self._open[sample_id] = _Sample(job, step, index)
                recipe = job.recipe
                picture = self._picture(sample_id, prompt, recipe.seed, recipe.validation_steps)
                self._paint(replace(picture, adapters=(use,)), origin)

    def _picture(self, generation_id: str, prompt: str, seed: int, steps: int) -> GenerationJob:
        """Of the base alone."""
        defaults = self._defaults
        return GenerationJob(
            id=generation_id,
            prompt=prompt,
            negative_prompt=None,
            adapters=(),
            seed=seed,
            num_images=1,
            num_inference_steps=steps,
            guidance_scale=defaults.guidance_scale,
            scheduler=defaults.scheduler,
            width=defaults.width,
            height=defaults.height,
            mode=Mode.STRICT,
            bucket=SAMPLE_BUCKET,
            priority=Priority.LOW,  # nobody waits for it as for a picture that was asked for
        )

    def painted(self, picture: ImageReady) -> None:
        if self.class_images.owns(picture.job_id):
            self.class_images.painted(picture)
            return
        sample = self._open[picture.job_id]
        prompt = sample.job.recipe.validation_prompts[sample.index]
        self._emit(
            SampleReady(
                sample.job.id,
                sample.step,
                sample.index,
                prompt,
                picture.seed,
                picture.mime_type,
                picture.data,
            )
        )

    def ended(self, generation_id: str, failure: JobFailed | None = None) -> str:
        """One is painted, or could not be; its training. A missing sample is a warning, no reason to stop."""
        if self.class_images.owns(generation_id):
            return self.class_images.ended(generation_id, failure)
        sample = self._open.pop(generation_id)
        if failure is not None:
            message = f"no sample of prompt {sample.index} at step {sample.step}: {failure.message}"
            self._emit(TrainingWarning(sample.job.id, "SAMPLE_FAILED", message))
        return sample.job.id

    def forget(self, training_id: str) -> None:
        """Cancels those of a training."""
        for sample_id in [name for name, sample in self._open.items() if sample.job.id == training_id]:
            del self._open[sample_id]
            self._unpaint(sample_id)
