"""One generation: what it has said so far, and those who read it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from copy import copy
from dataclasses import replace

from atelier_server.core import GenerationJob
from atelier_server.errors import AtelierError, by_reason
from atelier_server.messages import GenerationCompleted, ImageReady, JobFailed, PreviewReady, Progress, Queued
from atelier_server.origin import NOWHERE, Origin

_ENTRY_BYTES = 4096  # about what a finished generation takes beside its pictures

StreamEvent = Queued | Progress | PreviewReady | ImageReady | GenerationCompleted


class Generation:
    """The history of one job, kept small: its first `queued`, the latest `queued` and `progress`, the latest
    preview of every picture until that has come, its pictures and its end. Each entry carries a tick that
    only grows, so a reader needs one number to know what is new to it, however slow it is.
    """

    def __init__(
        self,
        job: GenerationJob,
        request_id: str,
        body_hash: str,
        admitted_at: float,
        order: int,
        *,
        tenant: str,
        origin: Origin = NOWHERE,
    ) -> None:
        self.job = job
        self.request_id = request_id
        self.body_hash = body_hash
        self.admitted_at = admitted_at
        self.order = order
        self.tenant = tenant
        self.origin = origin
        self.submitted = False
        self.begun = False
        self.losses = 0
        self.ended = False
        self.end_time = 0.0
        self.kept_until = 0.0
        self.readers: set[Reader] = set()
        self.failure: AtelierError | None = None
        self._history: list[tuple[int, StreamEvent]] = []
        self._images: set[int] = set()
        self._tick = 0
        self.kept_bytes = _ENTRY_BYTES

    def publish(self, event: StreamEvent, *, again: bool = False) -> None:
        """Adds an event. A picture that was sent in a former attempt is not sent again, and a position
        that was just told only if `again`.
        """
        match event:
            case ImageReady():
                if event.index in self._images:
                    return
                self._images.add(event.index)
                self.kept_bytes += len(event.data)
                self._drop_preview(event.index)
            case PreviewReady():
                if event.index in self._images:
                    return
                self._drop_preview(event.index)
            case Progress():
                self._history = [e for e in self._history if not isinstance(e[1], Progress)]
            case Queued():
                if not again and self._history and self._history[-1][1] == event:
                    return
                # The first stays: every reader's stream begins with it.
                self._history = [
                    e for i, e in enumerate(self._history) if i == 0 or not isinstance(e[1], Queued)
                ]
        self._tick += 1
        self._history.append((self._tick, event))
        self._wake()

    def _drop_preview(self, index: int) -> None:
        self._history = [
            e for e in self._history if not (isinstance(e[1], PreviewReady) and e[1].index == index)
        ]

    def after(self, tick: int) -> tuple[int, StreamEvent] | None:
        """The first event after `tick`."""
        return next((entry for entry in self._history if entry[0] > tick), None)

    def lost(self, order: int, *, alone: bool) -> None:
        """The worker died under it: it waits again, at the end of the queue."""
        self.losses += 1
        self.submitted = self.begun = False
        self.order = order
        self.job = replace(self.job, alone=alone)
        self._history = [e for e in self._history if not isinstance(e[1], Progress)]

    def end(self, failure: JobFailed | Exception | None, end_time: float) -> None:
        """No event comes after this; readers get the rest, then the failure."""
        if isinstance(failure, JobFailed):
            self.failure = by_reason(
                failure.reason, failure.message, dict(failure.metadata), failure.violations
            )
        elif isinstance(failure, AtelierError):
            self.failure = failure
        # A finished generation is kept for its receipt, not for the pictures that came with the request.
        self.job = replace(
            self.job,
            init=self.job.init.forgotten() if self.job.init else None,
            controlnets=tuple(use.forgotten() for use in self.job.controlnets),
        )
        self.ended = True
        self.end_time = end_time
        self._wake()

    def _wake(self) -> None:
        for reader in self.readers:
            reader.wake.set()


class Reader:
    """One stream on a generation. `close` it when the stream has gone, also twice."""

    def __init__(self, generation: Generation, gone: Callable[[Generation], None]) -> None:
        self.generation = generation
        self.wake = asyncio.Event()
        self._gone = gone
        self._tick = 0
        generation.readers.add(self)

    def close(self) -> None:
        if self in self.generation.readers:
            self.generation.readers.remove(self)
            self._gone(self.generation)

    async def events(self) -> AsyncIterator[StreamEvent]:
        """What has been, then what comes. Raises what the generation failed with."""
        while True:
            self.wake.clear()
            entry = self.generation.after(self._tick)
            if entry is not None:
                self._tick = entry[0]
                yield entry[1]
            elif not self.generation.ended:
                await self.wake.wait()
            elif (failure := self.generation.failure) is not None:
                # A new object for each reader: a raised exception belongs to whoever raised it.
                raise copy(failure)
            else:
                return
