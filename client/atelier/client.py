"""The synchronous client: waits, and nothing else; what to send and what comes back is the codec's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from atelier import channel, codec, streams
from atelier.craft import CraftCalls
from atelier.errors import from_rpc
from atelier.events import Completed, GenerationEvent, GenerationResult, TrainingEvent
from atelier.fields import GenerateFields, RecipeFields
from atelier.library import AdapterCalls
from atelier.recipe import RecipeSource
from atelier.records import (
    ServerInfo,
    Training,
    TrainingImage,
)
from atelier.security import Security
from atelier.selection import Adapters
from atelier.v1 import server_pb2, training_pb2
from atelier.v1.adapter_pb2_grpc import AdapterServiceStub
from atelier.v1.generation_pb2_grpc import GenerationServiceStub
from atelier.v1.server_pb2_grpc import ServerServiceStub
from atelier.v1.training_pb2_grpc import TrainingServiceStub
from atelier.wire import decode

Request = TypeVar("Request")
Response = TypeVar("Response")
Event = TypeVar("Event")


class Client(AdapterCalls, CraftCalls):
    """A connection to one server; safe to use from several threads; a context manager.

    `address` is HOST:PORT (default: ATELIER_SERVER, else 127.0.0.1:50051). `timeout` bounds every short
    call. Generations and trainings outlive a lost connection for `reconnect_timeout` seconds. Every method
    raises the errors of `atelier.errors`.

    `token` or `token_file` say who calls; `tls` encrypts, with the authorities of this machine or of
    `tls_ca`; `tls_cert` and `tls_key` are the client's own certificate. Each has its ATELIER_* variable.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        timeout: float | None = channel.CALL_TIMEOUT_SECONDS,
        reconnect_timeout: float = channel.RECONNECT_TIMEOUT_SECONDS,
        token: str | None = None,
        token_file: str | Path | None = None,
        tls: bool | None = None,
        tls_ca: str | Path | None = None,
        tls_cert: str | Path | None = None,
        tls_key: str | Path | None = None,
    ) -> None:
        self.address = address or channel.default_address()
        self._timeout = timeout
        self._reconnect_timeout = reconnect_timeout
        security = Security.of(
            token=token, token_file=token_file, tls=tls, tls_ca=tls_ca, tls_cert=tls_cert, tls_key=tls_key
        )
        self._channel = security.channel(self.address, channel.OPTIONS)
        self._generation = GenerationServiceStub(self._channel)
        self._trainings = TrainingServiceStub(self._channel)
        self._adapters = AdapterServiceStub(self._channel)
        self._server = ServerServiceStub(self._channel)

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ generation
    def generate(
        self,
        prompt: str,
        *,
        adapters: Adapters = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Unpack[GenerateFields],
    ) -> GenerationResult:
        """Paints and waits for all pictures. `adapters` are references with weights, see `selection`."""
        events = list(
            self.generate_stream(prompt, adapters=adapters, request_id=request_id, timeout=timeout, **fields)
        )
        completed = events[-1]
        assert isinstance(completed, Completed)  # a stream without it has raised
        return codec.result(events, completed)

    def generate_stream(
        self,
        prompt: str,
        *,
        adapters: Adapters = (),
        request_id: str | None = None,
        timeout: float | None = None,
        **fields: Unpack[GenerateFields],
    ) -> Iterator[GenerationEvent]:
        """The events of `generate` as they come; leaving the iterator (`close()`) cancels the request."""
        request = codec.generate_request(prompt, adapters, request_id, fields)
        stream = streams.GenerationStream(request, reconnect_timeout=self._reconnect_timeout, timeout=timeout)
        return _follow(stream, lambda: self._generation.Generate(request, timeout=stream.remaining()))

    # ------------------------------------------------------------------------------------------- trainings
    def train(
        self,
        name: str | None = None,
        images: Sequence[TrainingImage | str | Path | bytes] | None = None,
        *,
        folder: str | Path | None = None,
        instance_prompt: str | None = None,
        recipe: RecipeSource | None = None,
        request_id: str | None = None,
        cancel_on_disconnect: bool = False,
        **fields: Unpack[RecipeFields],
    ) -> Iterator[TrainingEvent]:
        """Starts a training and yields its events; re-attaches by itself when the connection is lost.

        `recipe` is a TOML file or a mapping of fields, name and instance prompt among them; keywords take the
        place of what it says. The upload begins with the first `next()`. Leaving the iterator leaves the
        training running.
        """
        pictures = codec.training_images(images, folder)
        start = codec.train_start(
            len(pictures),
            source=recipe,
            request_id=request_id,
            cancel_on_disconnect=cancel_on_disconnect,
            values={"name": name, "instance_prompt": instance_prompt, **fields},
        )
        return self._attach(
            streams.TrainingStream(start=start, images=pictures, reconnect_timeout=self._reconnect_timeout)
        )

    def watch_training(self, training: str, *, after_seq: int = 0) -> Iterator[TrainingEvent]:
        """The events after `after_seq` of a training (its id, or an adapter's name), then those to come."""
        return self._attach(
            streams.TrainingStream(
                training=training, after_seq=after_seq, reconnect_timeout=self._reconnect_timeout
            )
        )

    def get_training(self, training: str) -> Training:
        request = training_pb2.GetTrainingRequest(training=training)
        return decode(Training, self._call(self._trainings.GetTraining, request).training)

    def list_trainings(self) -> Iterator[Training]:
        """Newest first."""
        request = training_pb2.ListTrainingsRequest()
        while True:
            page = self._call(self._trainings.ListTrainings, request)
            yield from (decode(Training, training) for training in page.trainings)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def cancel_training(self, training: str) -> Training:
        """Stops at the next step; what has been learned so far is published."""
        request = training_pb2.CancelTrainingRequest(training=training)
        return decode(Training, self._call(self._trainings.CancelTraining, request).training)

    def pause_training(self, training: str) -> Training:
        """Stops at the next step and keeps what has been learned, until `resume_training`."""
        request = training_pb2.PauseTrainingRequest(training=training)
        return decode(Training, self._call(self._trainings.PauseTraining, request).training)

    def resume_training(self, training: str) -> Training:
        """Queues a paused, cancelled or failed training again, from its last checkpoint."""
        request = training_pb2.ResumeTrainingRequest(training=training)
        return decode(Training, self._call(self._trainings.ResumeTraining, request).training)

    def delete_training(self, training: str) -> None:
        """Deletes record, pictures, samples and full weights; the adapter stays."""
        request = training_pb2.DeleteTrainingRequest(training=training)
        self._call(self._trainings.DeleteTraining, request)

    # ---------------------------------------------------------------------------------------------- server
    def server_info(self) -> ServerInfo:
        """Answers at once, whatever the device is doing."""
        request = server_pb2.GetServerInfoRequest()
        return decode(ServerInfo, self._call(self._server.GetServerInfo, request))

    def _call(self, method: grpc.UnaryUnaryMultiCallable[Request, Response], request: Request) -> Response:
        try:
            return method(request, timeout=self._timeout)
        except grpc.RpcError as error:
            raise from_rpc(error) from error

    def _attach(self, stream: streams.TrainingStream) -> Iterator[TrainingEvent]:
        def open_call() -> Any:
            uploads = stream.uploads()
            return (
                self._trainings.WatchTraining(stream.watch())
                if uploads is None
                else self._trainings.Train(uploads)
            )

        return _follow(stream, open_call)


def _follow(stream: streams.Stream[Any, Event], open_call: Callable[[], Any]) -> Iterator[Event]:
    """Yields a stream's events over as many calls as it takes."""
    while not stream.ended:
        call = open_call()
        try:
            for response in call:
                event = stream.receive(response)
                if event is not None:
                    yield event
            wait = stream.closed()
        except grpc.RpcError as error:
            wait = stream.lost(from_rpc(error))
        finally:
            call.cancel()
        time.sleep(wait)
