"""Fakes for the seams that unit tests need. Small on purpose."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from atelier_server.core import AdapterUse, CheckpointId, GenerationJob, Mode, Recipe, TrainingJob
from atelier_server.engine.companies import Place
from atelier_server.engine.runner import (
    Decoded,
    Memory,
    OnDevice,
    Published,
    StepReport,
    TrainingRun,
    TrainOutcome,
)
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import AdapterNotFound, OutOfMemory
from atelier_server.report import AdapterReport, ImportTerms, TokenReport, UnmatchedPart

REPORT = AdapterReport(
    format="peft",
    confidence=0.875,
    software="OneTrainer",
    family="sdxl",
    evidence="its header says so",
    base_family="sd1",
    matched=("unet.a", "unet.b"),
    unmatched=(UnmatchedPart("unet.c", "the base model has no such module"),),
    coverage=0.75,
    kinds=(("dora", 1), ("lora", 1)),
    ranks=((4, 2),),
    alphas=((0.5, 1), (8.0, 1)),
    tokens=(TokenReport("<sks>", 2, ("text_encoder",)),),
    triggers=("sks",),
    metadata=(("ss_epoch", "3"),),
    norms=(("unet.mid_block", 1.5),),
)


def use(name: str, step: int = 100, weight: float = 1.0) -> AdapterUse:
    return AdapterUse(CheckpointId(name, 1, step), weight, f"{name}.safetensors", "")


def generation(job_id: str, *, adapters: tuple[AdapterUse, ...] = (), **fields: object) -> GenerationJob:
    defaults: dict[str, object] = {
        "prompt": "p", "negative_prompt": "", "seed": 1, "num_images": 1, "num_inference_steps": 3,
        "guidance_scale": 5.0, "scheduler": "ddim", "width": 64, "height": 64, "mode": Mode.FAST, "bucket": 0,
    }  # fmt: skip
    return GenerationJob(id=job_id, adapters=adapters, **(defaults | fields))  # type: ignore[arg-type]


def training(job_id: str, *, resume_step: int = 0, **fields: object) -> TrainingJob:
    recipe = Recipe(instance_prompt="a sks", resolution=64, **fields)  # type: ignore[arg-type]
    return TrainingJob(job_id, job_id.split("-", maxsplit=1)[0], 1, recipe, (), resume_step)


class FakeRun:
    """A training whose steps do nothing. `broken` maps a step to the error of it, `unwritten` to that of its
    checkpoint; a step takes `micro_steps`, and a checkpoint `pieces` of work before it is published.
    """

    pieces = 0

    def __init__(self, job: TrainingJob, place: Place, micro_steps: int) -> None:
        self.job, self.place, self.micro_steps = job, place, micro_steps
        self.broken: dict[int, Exception] = {}
        self.unwritten: dict[int, Exception] = {}
        self.step, self.accumulated = job.resume_step, 0
        self.published = Published(use(job.name, self.step), 1, 0.1) if self.step else None

    def prepare(self) -> Iterator[None]:
        yield
        yield

    def train(self) -> TrainOutcome:
        if error := self.broken.get(self.step + 1):
            return error
        self.accumulated = (self.accumulated + 1) % self.micro_steps
        if self.accumulated:
            return None
        self.step += 1
        return StepReport(1.0 / self.step, 1e-4)

    def publishing(self) -> Iterator[None]:
        yield from [None] * self.pieces

    def publish(self) -> Published:
        assert not self.accumulated
        if error := self.unwritten.pop(self.step, None):
            raise error
        self.published = Published(use(self.job.name, self.step), 1, 0.1)
        return self.published


class FakeRunner:
    """Counts instead of computing. `missing` names adapters whose load fails; a step takes 1 s of `now`."""

    def __init__(self) -> None:
        self.log: list[tuple[str, object]] = []
        self.now = 0.0
        self.slots: dict[int, CheckpointId] = {}
        self.progress: dict[int, int] = {}
        self.missing: set[str] = set()
        self.broken: dict[int, Exception] = {}  # of every training
        self.runs: dict[str, FakeRun] = {}
        self.place = Place()  # of every training
        self.micro_steps = 1
        self.denoise_error: Exception | None = None
        self.odd: Callable[[GenerationJob], bool] = lambda job: False
        self.decode_errors: list[Exception] = []  # one each time
        self.memory_rows = 16  # rows that a forward has memory for
        self.memory_trainings = 16  # and trainings

    def open(self, task: ImageTask, slots: Mapping[CheckpointId, int]) -> None:
        self.progress[task.arrival] = 0

    def steps(self, task: ImageTask) -> int:
        return task.job.num_inference_steps

    def denoise(
        self, tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]
    ) -> list[bool]:
        self.now += 1
        if self.denoise_error:
            error, self.denoise_error = self.denoise_error, None
            raise error
        if any(self.odd(task.job) for task in tasks):
            raise RuntimeError("odd")
        if bucket > self.memory_rows:
            raise MemoryError
        assert sum(task.rows for task in tasks) <= bucket
        for task in tasks:
            assert all(self.slots[slots[c]] == c for c in task.checkpoints)
            self.progress[task.arrival] += 1
        self.log.append(("denoise", tuple(task.job.id for task in tasks)))
        return [self.progress[task.arrival] == task.job.num_inference_steps for task in tasks]

    def decode(self, task: ImageTask, done: Callable[[Decoded], None], *, alone: bool = False) -> None:
        assert task.arrival in self.progress, "what is closed cannot be decoded"
        self.log.append(("decode", (task.job.id, alone)))
        if self.decode_errors:
            done(Decoded(b"", error=self.decode_errors.pop(0)))
            return
        done(Decoded(f"{task.job.id}:{task.index}".encode()))

    def preview(self, task: ImageTask, done: Callable[[bytes], None]) -> None:
        done(f"{task.job.id}:{task.index} after {self.progress[task.arrival]}".encode())

    def close(self, task: ImageTask) -> None:
        self.progress.pop(task.arrival, None)

    def prefetch(self, use: AdapterUse) -> None:
        self.log.append(("prefetch", use.checkpoint.name))

    def load(self, use: AdapterUse, slot: int) -> str:
        if use.checkpoint.name in self.missing:
            raise AdapterNotFound("gone", name=use.checkpoint.name)
        self.slots[slot] = use.checkpoint
        self.log.append(("load", use.checkpoint.name))
        return "host"

    def clear(self, slot: int) -> None:
        self.slots.pop(slot, None)

    def open_training(self, job: TrainingJob) -> FakeRun:
        run = self.runs[job.id] = FakeRun(job, self.place, self.micro_steps)
        run.broken |= self.broken
        return run

    def train(self, runs: Sequence[TrainingRun]) -> list[TrainOutcome]:
        self.now += 1
        if len(runs) > self.memory_trainings:
            raise MemoryError
        fakes = [run for run in runs if isinstance(run, FakeRun)]
        outcomes = [run.train() for run in fakes]
        self.log += [
            ("train", run.step)
            for run, out in zip(fakes, outcomes, strict=True)
            if isinstance(out, StepReport)
        ]
        self.log.append(("together", tuple(run.job.id for run in fakes)))
        return outcomes

    def import_adapter(
        self, path: str, name: str, new_version: bool, terms: ImportTerms, on_device: OnDevice
    ) -> tuple[CheckpointId, AdapterReport]:
        report = replace(REPORT, probe=on_device(lambda: 0.5))
        return CheckpointId(name, 2 if new_version else 1, 0), report

    def export_adapter(self, use: AdapterUse, layout: str, path: str) -> tuple[int, str]:
        return len(path), layout

    def out_of_memory(self, error: Exception) -> OutOfMemory | None:
        return OutOfMemory("too little", {"free_bytes": "1"}) if isinstance(error, MemoryError) else None

    def memory(self) -> Memory:
        return Memory(0, 0, 0)
