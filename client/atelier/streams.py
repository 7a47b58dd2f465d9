"""What a long call needs to outlive its connection, without doing any waiting itself.

A transport opens a call, hands every response to `receive`, and tells how the call ended: `closed` or `lost`
answer with the seconds to wait before the next call, or raise what the caller is to see. `ended` says that
all is done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

import grpc

from atelier import codec, wire
from atelier.errors import AtelierError, FailedPreconditionError, UnavailableError
from atelier.events import Completed, GenerationEvent, Image, TrainingCompleted, TrainingEvent, TrainingState
from atelier.records import TrainingImage
from atelier.transfer import ImageAssembler
from atelier.v1 import generation_pb2, training_pb2

logger = logging.getLogger("atelier")

FIRST_WAIT_SECONDS = 0.1
LONGEST_WAIT_SECONDS = 5.0

Clock = Callable[[], float]
Response_contra = TypeVar("Response_contra", contravariant=True)
Event_co = TypeVar("Event_co", covariant=True)


class Stream(Protocol[Response_contra, Event_co]):
    """What the transports see of a long call."""

    @property
    def ended(self) -> bool: ...
    def receive(self, response: Response_contra) -> Event_co | None: ...
    def closed(self) -> float: ...
    def lost(self, error: AtelierError) -> float: ...


class Reconnection:
    """How long to wait before the next try: from 0.1 s doubling to 5 s, or as the server asks; no jitter.

    The window of `timeout` seconds begins when the connection is lost; hearing anything ends it.
    """

    def __init__(self, timeout: float, clock: Clock = time.monotonic) -> None:
        self._timeout = timeout
        self._clock = clock
        self._lost_at: float | None = None
        self._tries = 0

    def heard(self) -> None:
        self._lost_at, self._tries = None, 0

    def wait(self, error: AtelierError) -> float:
        """Seconds to wait; raises `error` if it does not pass by itself or the window has closed."""
        now = self._clock()
        self._lost_at = now if self._lost_at is None else self._lost_at
        left = self._lost_at + self._timeout - now
        if not is_passing(error) or left <= 0:
            raise error
        if self._tries == 0:
            logger.warning("connection lost (%s); trying again for %g s", error.message, self._timeout)
        backoff = FIRST_WAIT_SECONDS * 2.0 ** min(self._tries, 10)
        self._tries += 1
        return min(max(backoff, error.retry_after or 0.0), LONGEST_WAIT_SECONDS, left)


def is_passing(error: AtelierError) -> bool:
    """Whether the same call may succeed a little later.

    A server that is killed can cut a stream with another code than UNAVAILABLE. WORKER_LOST is the
    server's verdict after its own tries: this request kills workers.
    """
    if error.code is grpc.StatusCode.UNAVAILABLE:
        return error.reason != "WORKER_LOST"
    odd = error.code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    cut = odd and any(words in error.message for words in ("RST_STREAM", "Stream removed"))
    return (cut or error.code is grpc.StatusCode.CANCELLED) and not error.reason


class _Resumable(Generic[Event_co]):
    """The half that both kinds of stream share."""

    def __init__(self, reconnect_timeout: float, clock: Clock) -> None:
        self._reconnection = Reconnection(reconnect_timeout, clock)
        self.ended = False

    def closed(self) -> float:
        """The call ended with OK."""
        return 0.0 if self.ended else self.lost(UnavailableError("the stream ended before its last event"))

    def lost(self, error: AtelierError) -> float:
        """The call ended with `error`."""
        return 0.0 if self.ended and is_passing(error) else self._reconnection.wait(error)


class GenerationStream(_Resumable[GenerationEvent]):
    """One request for pictures, sent again with the same request_id until its last event has come.

    A picture comes once, however often the server tells of it.
    """

    def __init__(
        self,
        request: generation_pb2.GenerateRequest,
        *,
        reconnect_timeout: float,
        timeout: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(reconnect_timeout, clock)
        self.request = request
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout
        self._assembler = ImageAssembler()
        self._given: set[int] = set()

    def remaining(self) -> float | None:
        """Seconds until the caller's deadline, for the next call."""
        return None if self._deadline is None else max(self._deadline - self._clock(), 0.0)

    def receive(self, response: generation_pb2.GenerateResponse) -> GenerationEvent | None:
        self._reconnection.heard()
        kind = response.WhichOneof("event")
        if kind is None:
            return None  # a kind of event that this client does not know yet
        if kind == "image":
            return self._image(response.image)
        told = getattr(response, kind)
        event: GenerationEvent = wire.decode(wire.record_of(told), told)
        self.ended = isinstance(event, Completed)
        return event

    def lost(self, error: AtelierError) -> float:
        self._assembler = ImageAssembler()  # what has come of a picture comes again from its beginning
        wait, remaining = super().lost(error), self.remaining()
        return wait if remaining is None else min(wait, remaining)

    def _image(self, chunk: generation_pb2.GenerateResponse.Image) -> Image | None:
        image = self._assembler.add(chunk)
        if image is None or image.index in self._given:
            return None
        self._given.add(image.index)
        return image


class TrainingStream(_Resumable[TrainingEvent]):
    """The events of one training, each once and in order, over as many connections as it takes.

    Without a training's id the upload is repeated under its request_id, which gets the same training; with
    one the stream goes on after the last event that has come.
    """

    def __init__(
        self,
        *,
        start: training_pb2.TrainRequest.Start | None = None,
        images: Sequence[TrainingImage] = (),
        training: str = "",
        after_seq: int = 0,
        reconnect_timeout: float,
        clock: Clock = time.monotonic,
    ) -> None:
        super().__init__(reconnect_timeout, clock)
        self._start = start
        self._images = images
        self._seq = after_seq
        self._failure: AtelierError | None = None
        self.training = training

    def uploads(self) -> Iterator[training_pb2.TrainRequest] | None:
        """The messages of a Train call, or None when the training is known and `watch` is the way."""
        if self._start is None or self.training:
            return None
        return codec.train_requests(self._start, self._images)

    def watch(self) -> training_pb2.WatchTrainingRequest:
        return training_pb2.WatchTrainingRequest(training=self.training, after_seq=self._seq)

    def receive(
        self, response: training_pb2.TrainResponse | training_pb2.WatchTrainingResponse
    ) -> TrainingEvent | None:
        self._reconnection.heard()
        message = response.event
        self.training = message.training or message.accepted.training or self.training
        if message.seq <= self._seq:
            return None  # told already, over an earlier connection
        self._seq = message.seq
        event = codec.training_event(message)
        # A training that was resumed has ended before: only the last event tells how it stands.
        self.ended = isinstance(event, TrainingCompleted)
        self._failure = None
        if isinstance(event, TrainingCompleted) and event.state is TrainingState.FAILED:
            self._failure = FailedPreconditionError(event.message, reason=event.reason)
        return event

    def closed(self) -> float:
        """Nothing follows an OK, also where the last event was told before (`after_seq`)."""
        self.ended = True
        return 0.0

    def lost(self, error: AtelierError) -> float:
        if self.ended and self._failure is not None and is_passing(error):
            raise self._failure  # the status itself got lost, the event did not
        return super().lost(error)
