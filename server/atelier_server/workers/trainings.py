"""The trainings of this device, as the loop drives them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from atelier_server.adapters.store import CheckpointRecord
from atelier_server.core import ROW_BUCKETS, AdapterUse, TrainingJob
from atelier_server.engine.companies import Place
from atelier_server.engine.runner import Published, StepReport, TrainingRun, TrainOutcome
from atelier_server.training.company import micro_step
from atelier_server.training.trainer import Trainer


class TrainerRuns:
    """`make` gives a job its trainer; `context` is that of all that runs the U-Net."""

    def __init__(
        self,
        make: Callable[[TrainingJob], Trainer],
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self._make = make
        self._context = context
        # Those that have ended are gone as soon as the desk forgets them.
        self._runs: tuple[weakref.ref[TrainerRun], ...] = ()

    @property
    def _live(self) -> list[TrainerRun]:
        return [run for ref in self._runs if (run := ref()) is not None]

    @property
    def state_bytes(self) -> int:
        """What all of them hold on the device. Told from any thread."""
        return sum(run.state_bytes for run in self._live)

    def open(self, job: TrainingJob) -> TrainerRun:
        run = TrainerRun(self._make(job), self, self._context)
        self._runs = (*(ref for ref in self._runs if ref() is not None), weakref.ref(run))
        return run

    def train(self, runs: Sequence[TrainingRun]) -> list[TrainOutcome]:
        """See `Runner.train`."""
        ours = [run for run in runs if isinstance(run, TrainerRun)]
        with self._context():
            outcomes = micro_step([run.trainer for run in ours])
        for run in ours:
            run.stepped()
        return [
            StepReport(outcome.loss, outcome.learning_rate)
            if outcome is not None and not isinstance(outcome, Exception)
            else outcome
            for outcome in outcomes
        ]

    def bucket_for(self, trainer: Trainer) -> int:
        """How many rows the forwards of a training have for life that is about to make its first step.

        A bucket that those have which may keep it company; the smallest that holds them all where none has
        one yet; its own rows where it is alone.
        """
        others = [run.trainer for run in self._live if run.trainer is not trainer]
        peers = [other for other in others if other.kind is not None and other.kind == trainer.kind]
        if fitting := [peer.bucket for peer in peers if peer.bucket >= max(trainer.rows, peer.rows + 1)]:
            return max(fitting)
        if not (beginning := [peer.rows for peer in peers if not peer.bucket]):
            return trainer.rows
        rows = trainer.rows + sum(beginning)
        return next((bucket for bucket in ROW_BUCKETS if bucket >= rows), max(*ROW_BUCKETS, trainer.rows))


class TrainerRun:
    """One of them."""

    def __init__(
        self,
        trainer: Trainer,
        runs: TrainerRuns,
        context: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.trainer = trainer
        self._runs = runs
        self._context = context
        # Counted here and told by the heartbeat's thread: optimizers allocate at the first step.
        self.state_bytes = 0
        self._has_stepped = False

    @property
    def step(self) -> int:
        return self.trainer.step

    @property
    def place(self) -> Place:
        if not self.trainer.bucket:
            self.trainer.settle(self._runs.bucket_for(self.trainer))
        return Place(self.trainer.company, self.trainer.rows, self.trainer.bucket)

    @property
    def published(self) -> Published | None:
        record = self.trainer.published
        return _published(record) if record else None

    def prepare(self) -> Iterator[None]:
        yield from self.trainer.prepare()
        self.state_bytes = self.trainer.state_bytes()

    def stepped(self) -> None:
        """Its micro-step is over."""
        if not self._has_stepped:
            self._has_stepped = True
            self.state_bytes = self.trainer.state_bytes()

    def publishing(self) -> Iterator[None]:
        return self.trainer.publishing()

    def publish(self) -> Published:
        with self._context():  # it looks at the last batch once more
            return _published(self.trainer.publish())


def _published(record: CheckpointRecord) -> Published:
    use = AdapterUse(record.id, 1.0, record.path, record.sha256)
    loss = record.loss if record.loss is not None else 0.0
    return Published(use, record.size_bytes, loss, record.validation_loss, record.kept_share)
