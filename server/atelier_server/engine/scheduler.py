"""Which step runs next: one denoise step of a batch of pictures, or one micro-step of some trainings.

Pure bookkeeping over arrival order, shapes, buckets, slots and shares. Knows no torch and no clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import count

from atelier_server.core import ROW_BUCKETS, CheckpointId, GenerationJob, Priority
from atelier_server.engine.companies import Companies, Place
from atelier_server.engine.residency import Residency
from atelier_server.engine.shares import HEAVIEST, WEIGHTS, Shares
from atelier_server.engine.training_share import TrainingShare

DEFAULT_TRAINING_SHARE = 0.25


@dataclass(slots=True, eq=False)
class ImageTask:
    """One picture of a generation, from waiting to finished."""

    job: GenerationJob
    index: int
    arrival: int
    checkpoints: frozenset[CheckpointId] = field(default_factory=frozenset)
    started: bool = False
    buckets: list[int] = field(default_factory=list)  # of its forwards so far
    decoded: bool = False
    decoded_alone: bool = False  # it has been tried

    @property
    def steps_done(self) -> int:
        """Its forwards."""
        return len(self.buckets)

    @property
    def bucket(self) -> int:
        """The largest that it has run in."""
        return max(self.buckets, default=0)

    @property
    def wants_preview(self) -> bool:
        every = self.job.preview_steps
        return every > 0 and self.steps_done % every == 0

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
    """One micro-step of these trainings, all in one forward."""

    training_ids: tuple[str, ...]


# Rows of a lane share a forward's shape: width, height, the exact bucket (0 = fast), and the job's id
# where it wants to be alone.
Lane = tuple[int, int, int, str]
# Those who share the device: a client with what it asked for at one priority.
Flow = tuple[str, Priority]


def all_rows(width: int, height: int) -> int:  # noqa: ARG001 - the largest forward, whatever the size
    return ROW_BUCKETS[-1]


class Scheduler:
    """Clients share the device by priority: whoever has had least says which lane runs, and the rows that are
    left over go to the others who have pictures in it. A client's own lanes take turns by what they cost;
    what he asked for at one size and priority runs in the order of arrival.

    While pictures and trainings both wait, trainings get `training_share` of the seconds that `spent` tells.
    `row_limit` tells how many rows of a width and a height fit the memory.
    """

    def __init__(
        self,
        residency: Residency,
        row_limit: Callable[[int, int], int] = all_rows,
        training_share: float = DEFAULT_TRAINING_SHARE,
    ) -> None:
        self._residency = residency
        self._row_limit = row_limit
        self._tasks: list[ImageTask] = []
        self._trainings = Companies()
        self._share = TrainingShare(training_share)
        self._arrivals = count()
        self._flows: Shares[Flow] = Shares()
        self._lanes: dict[Flow, Shares[Lane]] = {}
        # Buckets that ran out of memory, by width and height, while pictures of that size are there.
        self._too_large: dict[tuple[int, int], int] = {}

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
        self._recount()
        return tasks

    def remove(self, tasks: Iterable[ImageTask]) -> None:
        gone = {id(task) for task in tasks}
        self._tasks = [task for task in self._tasks if id(task) not in gone]
        self._recount()

    def _recount(self) -> None:
        self._flows.present(_flow(task) for task in self._tasks)
        sizes = {(task.job.width, task.job.height) for task in self._tasks}
        self._too_large = {size: bucket for size, bucket in self._too_large.items() if size in sizes}

    def shrink(self, batch: DenoiseBatch) -> bool:
        """The batch ran out of memory. True if its pictures can be tried again in a smaller forward; False
        where it was the smallest that they can run in (a strict picture runs in its own bucket only).
        """
        if batch.bucket == ROW_BUCKETS[0] or any(task.job.bucket for task in batch.tasks):
            return False
        self._too_large[batch.tasks[0].job.width, batch.tasks[0].job.height] = batch.bucket
        return True

    def part(self, batch: DenoiseBatch) -> bool:
        """The batch failed, and it is not known on whose account. True if it was of several requests: each
        goes on alone from here; False where it is the fault of the only one.
        """
        together = {task.job.id for task in batch.tasks}
        if len(together) == 1:
            return False
        for task in self._tasks:
            if task.job.id in together:
                task.job = replace(task.job, alone=True)
        return True

    def submit_training(
        self, training_id: str, place: Callable[[], Place] = Place, priority: Priority = Priority.NORMAL
    ) -> None:
        """`place` tells what it needs of its next micro-step."""
        self._trainings.join(training_id, place, priority)

    def remove_training(self, training_id: str) -> None:
        self._trainings.leave(training_id)
        if not self._trainings:
            self._share.forget()

    def shrink_training(self, training_ids: Sequence[str]) -> None:
        """So many ran out of memory in one forward: from now on they are fewer."""
        self._trainings.crowded(training_ids)

    # ------------------------------------------------------------------------------------ what runs next
    def schedule(self) -> DenoiseBatch | TrainStep | None:
        """The next step, or None where there is nothing to do."""
        if self._trainings and (not self._tasks or self._share.is_due):
            return TrainStep(self._trainings.next())
        if not self._tasks:
            return None
        return self._batch(self._next_lane())

    def _next_lane(self) -> Lane:
        """Of the client who has had least, the lane that has had least; at a draw what came first."""
        oldest: dict[Flow, dict[Lane, int]] = {}
        for task in self._tasks:
            oldest.setdefault(_flow(task), {}).setdefault(_lane(task), task.arrival)
        self._lanes = {flow: self._lanes.get(flow, Shares()) for flow in oldest}
        for flow, lanes in oldest.items():
            self._lanes[flow].present(lanes)  # a picture's lane may change from forward to forward
        mine = min(oldest, key=lambda flow: (self._flows[flow], next(iter(oldest[flow].values()))))
        had = self._lanes[mine]
        return min(oldest[mine], key=lambda lane: (had[lane], oldest[mine][lane]))

    def spent(self, step: DenoiseBatch | TrainStep, seconds: float) -> None:
        """What a step has taken of the device."""
        if not self._trainings:
            return
        if isinstance(step, TrainStep):
            self._trainings.charge(step.training_ids, seconds)
            self._share.trained(seconds, pictures_wait=bool(self._tasks))
        else:
            self._share.painted(seconds)

    def _batch(self, lane: Lane) -> DenoiseBatch:
        """Pictures of the lane that fit the rows and the slots, from whoever has had least.

        A strict forward has its rows anyway: pictures of the fast lane of the same size fill those left
        over (a strict row's bits do not depend on its neighbours).
        """
        width, height, exact, alone = lane
        chosen = _Rows(self._residency, exact or self._capacity(width, height))
        self._fill(chosen, lane)
        if exact and not alone:
            self._fill(chosen, (width, height, 0, ""))
        return DenoiseBatch(tuple(chosen.tasks), exact or next(b for b in ROW_BUCKETS if b >= chosen.rows))

    def _fill(self, chosen: _Rows, lane: Lane) -> None:
        """Gives the next rows to the flow with the least virtual time, until none has a picture that fits."""
        waiting: dict[Flow, deque[ImageTask]] = {}
        for task in self._tasks:
            if _lane(task) == lane:
                waiting.setdefault(_flow(task), deque()).append(task)
        order = [(self._flows[flow], tasks[0].arrival, flow) for flow, tasks in waiting.items()]
        heapify(order)
        while order:
            _, _, flow = heappop(order)
            tasks = waiting[flow]
            while tasks:
                task = tasks.popleft()
                if chosen.add(task):
                    self._flows.charge(flow, _cost(task))
                    self._lanes[flow].charge(lane, _cost(task))
                    break
            if tasks:
                heappush(order, (self._flows[flow], tasks[0].arrival, flow))

    def _capacity(self, width: int, height: int) -> int:
        """The largest bucket that fits the memory, as far as is known; never less than the smallest."""
        limit = self._row_limit(width, height)
        if (too_large := self._too_large.get((width, height))) is not None:
            limit = min(limit, too_large - 1)
        return max((bucket for bucket in ROW_BUCKETS if bucket <= limit), default=ROW_BUCKETS[0])


@dataclass(slots=True)
class _Rows:
    """A forward being filled."""

    residency: Residency
    capacity: int
    tasks: list[ImageTask] = field(default_factory=list)
    rows: int = 0
    checkpoints: frozenset[CheckpointId] = frozenset()

    def add(self, task: ImageTask) -> bool:
        """Takes a picture in if its rows and its adapters fit. The first one's always do: pins give way."""
        checkpoints = self.checkpoints | task.checkpoints
        fits = not self.tasks or self.residency.can_admit(checkpoints)
        if self.rows + task.rows > self.capacity or not fits:
            return False
        self.tasks.append(task)
        self.rows += task.rows
        self.checkpoints = checkpoints
        return True


def _lane(task: ImageTask) -> Lane:
    job = task.job
    return job.width, job.height, job.bucket_at(task.steps_done), job.id if job.alone else ""


def _flow(task: ImageTask) -> Flow:
    return task.job.client, task.job.priority


def _cost(task: ImageTask) -> int:
    """Of a step, for its weight: rows times pixels."""
    job = task.job
    return task.rows * job.width * job.height * HEAVIEST // WEIGHTS[job.priority]
