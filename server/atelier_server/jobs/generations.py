"""Generations: admitted, joined by request_id, run again when the worker dies, kept for a while.

They live in memory only: a generation that dies with the front is asked for again by its client.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import count

from atelier_server import origin
from atelier_server.access.tenants import Tenant
from atelier_server.core import CheckpointId, GenerationJob
from atelier_server.errors import Cancelled, QueueFull, RequestIdReused, ServerDraining, WorkerLost
from atelier_server.jobs.generation import Generation, Reader, StreamEvent
from atelier_server.jobs.quotas import check_images
from atelier_server.messages import (
    Cancel,
    Command,
    GenerationCompleted,
    ImageReady,
    JobCancelled,
    JobFailed,
    PreviewReady,
    Progress,
    Queued,
    Submit,
)
from atelier_server.metrics import Metrics

GenerationEvent = StreamEvent | JobFailed | JobCancelled
_ATTEMPTS = 3


class Generations:
    """The live generations, in order of admission, and the results of the last `keep_seconds`.

    `idle` is set while there is none.

    Results are kept in memory, the oldest dropped once they exceed `keep_bytes`: a repeat that
    comes after that is painted again.
    """

    def __init__(
        self,
        send: Callable[[Command], None],
        metrics: Metrics,
        *,
        limit: int,
        keep_seconds: float = 15 * 60,
        keep_bytes: int = 256 * 2**20,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._metrics = metrics
        self._limit = limit
        self._keep_seconds = keep_seconds
        self._keep_bytes = keep_bytes
        self._clock = clock
        self._live: dict[str, Generation] = {}
        self._requests: dict[str, Generation] = {}
        self._finished: OrderedDict[str, Generation] = OrderedDict()
        self._finished_bytes = 0
        self._order = count()
        self._ready = False
        self.draining = False
        self.idle = asyncio.Event()
        self.idle.set()

    # ------------------------------------------------------------------------------------------- readers
    def join(self, request_id: str, body_hash: str) -> Reader | None:
        """A reader of the generation that this id has already. Raises RequestIdReused."""
        self._expire()
        known = self._requests.get(request_id) if request_id else None
        if known is None:
            return None
        if known.body_hash != body_hash:
            raise RequestIdReused("another request had this request_id", name=request_id)
        return Reader(known, self._reader_gone)

    def admit(self, job: GenerationJob, request_id: str, body_hash: str, tenant: Tenant) -> Reader:
        """Queues a job, or joins the one that came in between.

        Raises QueueFull, QuotaExceeded, ServerDraining.
        """
        if (reader := self.join(request_id, body_hash)) is not None:
            return reader
        if self.draining:
            raise ServerDraining("the server is going away")
        held = sum(g.job.num_images for g in self._live.values() if g.tenant == tenant.name)
        # A full queue is full for those who are in it: nobody's crowd keeps another tenant out.
        if len(self._live) >= self._limit and held:
            raise QueueFull(f"{self._limit} generations are waiting or running")
        check_images(tenant, held, job.num_images)
        generation = Generation(
            job,
            request_id,
            body_hash,
            self._clock(),
            next(self._order),
            tenant=tenant.name,
            origin=origin.current(),
        )
        self._live[job.id] = generation
        if request_id:
            self._requests[request_id] = generation
        generation.publish(Queued(job.id, len(self._live) - 1))
        reader = Reader(generation, self._reader_gone)
        self._pump()
        return reader

    def _reader_gone(self, generation: Generation) -> None:
        if generation.readers or generation.ended:
            return
        if generation.submitted:
            self._send(Cancel(generation.job.id))
        self._end(generation, Cancelled("nobody reads this generation any more"))

    # ---------------------------------------------------------------------------------------- the worker
    def knows(self, job_id: str) -> bool:
        return job_id in self._live

    def handle(self, event: GenerationEvent) -> None:
        """An event of the worker; those of jobs that have gone are ignored."""
        generation = self._live.get(event.job_id)
        if generation is None:
            return
        match event:
            case Progress() | PreviewReady() | ImageReady():
                if not generation.begun:
                    generation.begun = True
                    self._metrics.work_began("generate", self._clock() - generation.admitted_at)
                    self._count()
                generation.publish(event)
            case Queued():
                generation.publish(event)
            case GenerationCompleted():
                self._metrics.generation_completed(event.timings)
                generation.publish(event)
                self._end(generation, None)
            case JobFailed():
                self._end(generation, event)
            case JobCancelled():
                self._end(generation, Cancelled("the worker cancelled this generation"))

    def worker_ready(self) -> None:
        self._ready = True
        self._pump()

    def worker_lost(self) -> bool:
        """Queues what the worker had again; True if one of them was on its last try, and so to blame."""
        self._ready = False
        last_try = False
        for generation in [g for g in self._live.values() if g.submitted]:
            last_try |= generation.job.alone
            generation.lost(next(self._order), alone=generation.losses + 2 >= _ATTEMPTS)
            if generation.losses >= _ATTEMPTS:
                message = f"the worker died {_ATTEMPTS} times under this request"
                self._end(generation, WorkerLost(message))
            else:
                position = sum(not g.submitted for g in self._live.values()) - 1
                generation.publish(Queued(generation.job.id, position), again=True)
        self._count()
        return last_try

    def _pump(self) -> None:
        """Submits what waits, in order. One that has to run alone is a barrier in both directions."""
        in_flight = [g for g in self._live.values() if g.submitted]
        waiting = sorted((g for g in self._live.values() if not g.submitted), key=lambda g: g.order)
        if self._ready and not any(g.job.alone for g in in_flight):
            for generation in waiting:
                if generation.job.alone and in_flight:
                    break
                generation.submitted = True
                in_flight.append(generation)
                self._send(Submit(generation.job, generation.origin))
                if generation.job.alone:
                    break
        self._count()

    # ------------------------------------------------------------------------------------------ the rest
    def uses(self, adapter: str, version: int | None) -> bool:
        """Whether an unfinished generation uses that adapter, or that version of it."""
        checkpoints = [use.checkpoint for g in self._live.values() for use in g.job.adapters]
        return any(c.name == adapter and version in (None, c.version) for c in checkpoints)

    def needs(self, checkpoint: CheckpointId) -> bool:
        """Whether an unfinished generation uses that checkpoint. Any thread."""
        return any(use.checkpoint == checkpoint for g in tuple(self._live.values()) for use in g.job.adapters)

    @property
    def count(self) -> int:
        """Generations that have not ended."""
        return len(self._live)

    def drain_waiting(self) -> None:
        """Ends those of which nothing is painted yet; admits no more."""
        self.draining = True
        self._drain(g for g in self._live.values() if not g.begun)

    def drain_all(self) -> None:
        """Ends every generation."""
        self._drain(self._live.values())

    def _drain(self, generations: Iterable[Generation]) -> None:
        for generation in list(generations):
            if generation.submitted:
                self._send(Cancel(generation.job.id))
            self._end(generation, ServerDraining("the server is going away"))

    def _end(self, generation: Generation, failure: JobFailed | Exception | None) -> None:
        generation.end(failure, time.time())
        self._live.pop(generation.job.id, None)
        request_id = generation.request_id
        if failure is None and request_id:
            generation.kept_until = self._clock() + self._keep_seconds
            self._finished[request_id] = generation
            self._finished_bytes += generation.kept_bytes
            self._expire()
        elif request_id:
            self._requests.pop(request_id, None)
        self._pump()

    def _expire(self) -> None:
        while self._finished:
            request_id, oldest = next(iter(self._finished.items()))
            if self._finished_bytes <= self._keep_bytes and oldest.kept_until > self._clock():
                return
            del self._finished[request_id]
            self._requests.pop(request_id, None)
            self._finished_bytes -= oldest.kept_bytes

    def _count(self) -> None:
        if self._live:
            self.idle.clear()
        else:
            self.idle.set()
        self._metrics.queue_depth("generate", sum(not g.begun for g in self._live.values()))
