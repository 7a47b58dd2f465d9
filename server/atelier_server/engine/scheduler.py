"""Which step runs next: one denoise step of a batch of pictures, or one micro-step of a training.

Pure bookkeeping over arrival order, shapes, buckets and slots. Knows no torch and no clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count

from atelier_server.core import ROW_BUCKETS, CheckpointId, GenerationJob
from atelier_server.engine.residency import Residency


@dataclass(slots=True, eq=False)
class ImageTask:
    """One picture of a generation, from waiting to finished."""

    job: GenerationJob
    index: int
    arrival: int
    checkpoints: frozenset[CheckpointId] = field(default_factory=frozenset)
    started: bool = False
    bucket: int = 0  # the largest it has run in
    steps_done: int = 0

    @property
    def seed(self) -> int:
        return self.job.seed + self.index

    @property
    def rows(self) -> int:
        return self.job.rows_per_image


@dataclass(frozen=True, slots=True)
class DenoiseBatch:
    """Pictures that take their next denoise step in one forward of exactly `bucket` rows."""

    tasks: tuple[ImageTask, ...]
    bucket: int


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One micro-step of this training."""

    training_id: str


# Rows of a lane share a forward's shape: width, height, the exact bucket (0 = fast), and the job's id
# where it wants to be alone.
Lane = tuple[int, int, int, str]


class Scheduler:
    """Lanes take turns; within a lane the oldest pictures run until they are finished.

    While someone waits for a picture, at most one training micro-step comes between two denoise steps.
    """

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._tasks: list[ImageTask] = []
        self._trainings: list[str] = []
        self._arrivals = count()
        self._turns = count(1)
        self._last_turn: dict[Lane, int] = {}
        self._train_next = False

    # ------------------------------------------------------------------------------------ what there is
    @property
    def has_work(self) -> bool:
        return bool(self._tasks or self._trainings)

    @property
    def tasks(self) -> tuple[ImageTask, ...]:
        """In order of arrival."""
        return tuple(self._tasks)

    def waiting_jobs(self) -> Iterator[str]:
        """Ids of the jobs of which no picture has started yet, in order of arrival."""
        started = {task.job.id for task in self._tasks if task.started}
        seen = set(started)
        for task in self._tasks:
            if task.job.id not in seen:
                seen.add(task.job.id)
                yield task.job.id

    # ------------------------------------------------------------------------------- what comes and goes
    def submit(self, job: GenerationJob) -> list[ImageTask]:
        checkpoints = frozenset(use.checkpoint for use in job.adapters)
        tasks = [
            ImageTask(job=job, index=i, arrival=next(self._arrivals), checkpoints=checkpoints)
            for i in range(job.num_images)
        ]
        self._tasks.extend(tasks)
        return tasks

    def remove(self, tasks: Iterable[ImageTask]) -> None:
        gone = {id(task) for task in tasks}
        self._tasks = [task for task in self._tasks if id(task) not in gone]
        lanes = {_lane(task) for task in self._tasks}
        self._last_turn = {lane: turn for lane, turn in self._last_turn.items() if lane in lanes}

    def submit_training(self, training_id: str) -> None:
        self._trainings.append(training_id)

    def remove_training(self, training_id: str) -> None:
        if training_id in self._trainings:
            self._trainings.remove(training_id)

    # ------------------------------------------------------------------------------------ what runs next
    def schedule(self) -> DenoiseBatch | TrainStep | None:
        """The next step, or None where there is nothing to do. Trainings take turns."""
        if self._trainings and (self._train_next or not self._tasks):
            self._train_next = False
            training = self._trainings.pop(0)
            self._trainings.append(training)
            return TrainStep(training)
        if not self._tasks:
            return None
        self._train_next = True
        lane = min({_lane(t): t.arrival for t in reversed(self._tasks)}.items(), key=self._turn)[0]
        self._last_turn[lane] = next(self._turns)
        return self._batch(lane)

    def _turn(self, lane_and_arrival: tuple[Lane, int]) -> tuple[int, int]:
        lane, arrival = lane_and_arrival
        return self._last_turn.get(lane, 0), arrival

    def _batch(self, lane: Lane) -> DenoiseBatch:
        """The oldest pictures of the lane that fit the rows and the slots.

        A strict forward has its rows anyway: pictures of the fast lane of the same size fill those left
        over (a strict row's bits do not depend on its neighbours).
        """
        width, height, exact, alone = lane
        capacity = exact or ROW_BUCKETS[-1]
        lanes = (lane,) if alone or not exact else (lane, (width, height, 0, ""))
        chosen: list[ImageTask] = []
        checkpoints: frozenset[CheckpointId] = frozenset()
        rows = 0
        for source in lanes:
            for task in self._tasks:
                if _lane(task) != source or rows + task.rows > capacity:
                    continue
                if self._residency.can_admit(checkpoints | task.checkpoints):
                    chosen.append(task)
                    checkpoints |= task.checkpoints
                    rows += task.rows
        return DenoiseBatch(tuple(chosen), exact or next(b for b in ROW_BUCKETS if b >= rows))


def _lane(task: ImageTask) -> Lane:
    job = task.job
    return job.width, job.height, job.bucket, job.id if job.alone else ""
