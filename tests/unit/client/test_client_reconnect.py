"""A server that goes away and comes back on its port: nothing lost, nothing told twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2

import atelier
from atelier.errors import AtelierError, DataLossError, UnavailableError
from atelier.events import Image
from atelier.streams import GenerationStream, Reconnection, TrainingStream
from atelier.v1 import generation_pb2, training_pb2


@pytest.mark.parametrize("pause_after", [1, 4, 9])
def test_a_training_goes_on_after_its_last_event(server: Any, folder: Path, pause_after: int) -> None:
    server.script.pause_after = pause_after
    thread = server.restart_when_paused()
    with atelier.Client(server.address) as client:
        events = list(client.train("otto", folder=folder, instance_prompt="x"))
    thread.join()
    assert [event.seq for event in events] == list(range(1, 11))
    assert len(server.script.uploads) == 1
    assert [(w.training, w.after_seq) for w in server.script.watches] == [("otto-k3f9", pause_after)]


def test_a_training_not_yet_accepted_is_sent_again_under_its_id(server: Any, folder: Path) -> None:
    server.script.pause_after = 0
    thread = server.restart_when_paused()
    with atelier.Client(server.address) as client:
        events = list(client.train("otto", folder=folder, instance_prompt="x"))
    thread.join()
    assert [event.seq for event in events] == list(range(1, 11))
    first, second = server.script.uploads
    assert first == second
    assert first[0].start.request_id
    assert not server.script.watches


def test_a_generation_is_sent_again_and_no_picture_comes_twice(server: Any) -> None:
    server.script.pause_generate = True
    thread = server.restart_when_paused()
    with atelier.Client(server.address) as client:
        events = list(client.generate_stream("x", num_images=2))
    thread.join()
    first, second = server.script.generates
    assert first == second
    assert [event.index for event in events if isinstance(event, Image)] == [0, 1]


async def test_the_async_client_reconnects_too(server: Any, folder: Path) -> None:
    server.script.pause_after = 3
    thread = server.restart_when_paused()
    async with atelier.AsyncClient(server.address) as client:
        events = [e async for e in client.train("otto", folder=folder, instance_prompt="x")]
        thread.join()
        assert [event.seq for event in events] == list(range(1, 11))
        server.script.paused.clear()
        server.script.pause_generate = True
        thread = server.restart_when_paused()
        result = await client.generate("x", num_images=2)
    thread.join()
    assert len(result.images) == 2


def test_the_window_closes(server: Any) -> None:
    server.stop()
    with atelier.Client(server.address, reconnect_timeout=0.4) as client, pytest.raises(UnavailableError):
        client.generate("x")


def test_waits_double_up_to_five_seconds_within_the_window() -> None:
    now = 0.0
    reconnection = Reconnection(20.0, lambda: now)
    lost = UnavailableError("gone")
    waits = []
    for _ in range(9):
        waits.append(reconnection.wait(lost))
        now += waits[-1]
    now = 20.0
    with pytest.raises(UnavailableError, match="gone"):
        reconnection.wait(lost)
    assert waits[:7] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0])
    assert sum(waits) == pytest.approx(20.0)
    reconnection.heard()
    assert reconnection.wait(lost) == 0.1
    assert reconnection.wait(UnavailableError("busy", retry_after=3.0)) == 3.0


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (UnavailableError("socket closed"), True),
        (UnavailableError("draining", reason="SERVER_DRAINING"), True),
        (UnavailableError("died", reason="WORKER_LOST"), False),
        (AtelierError("Received RST_STREAM", code=grpc.StatusCode.INTERNAL), True),
        (AtelierError("Stream removed (x)", code=grpc.StatusCode.DEADLINE_EXCEEDED), False),
        (AtelierError("bug", code=grpc.StatusCode.INTERNAL, reason="INTERNAL"), False),
        (AtelierError("no", code=grpc.StatusCode.INVALID_ARGUMENT), False),
    ],
)
def test_what_passes_by_itself(error: AtelierError, passing: bool) -> None:
    reconnection = Reconnection(10.0, lambda: 0.0)
    if passing:
        assert reconnection.wait(error) > 0
    else:
        with pytest.raises(AtelierError):
            reconnection.wait(error)


def _completed(state: str) -> training_pb2.TrainResponse:
    completed = training_pb2.TrainingEvent.Completed(
        state=state, reason="NONFINITE_LOSS", message="at step 3"
    )
    return training_pb2.TrainResponse(
        event=training_pb2.TrainingEvent(seq=4, training="t-1", completed=completed)
    )


def test_a_failed_training_raises_even_if_its_status_gets_lost() -> None:
    stream = TrainingStream(training="t-1", reconnect_timeout=10)
    stream.receive(_completed("TRAINING_STATE_FAILED"))
    with pytest.raises(atelier.FailedPreconditionError, match="NONFINITE_LOSS: at step 3"):
        stream.lost(UnavailableError("socket closed"))
    with pytest.raises(atelier.AbortedError):
        stream.lost(atelier.AbortedError("crash loop", reason="TRAINING_CRASH_LOOP"))


def test_a_completed_training_does_not_mind_losing_the_connection() -> None:
    stream = TrainingStream(training="t-1", reconnect_timeout=10)
    stream.receive(_completed("TRAINING_STATE_SUCCEEDED"))
    assert stream.lost(UnavailableError("socket closed")) == 0.0
    assert stream.ended


@pytest.mark.parametrize("state", ["TRAINING_STATE_FAILED", "TRAINING_STATE_CANCELLED"])
def test_a_resumed_training_has_not_ended_where_it_had_before(state: str) -> None:
    stream = TrainingStream(training="t-1", reconnect_timeout=10)
    stream.receive(_completed(state))
    restarted = training_pb2.TrainingEvent.Restarted(from_step=3)
    event = training_pb2.TrainingEvent(seq=5, training="t-1", restarted=restarted)
    stream.receive(training_pb2.WatchTrainingResponse(event=event))
    assert stream.lost(UnavailableError("socket closed")) > 0
    assert not stream.ended


def test_events_told_before_are_not_told_again() -> None:
    stream = TrainingStream(training="otto", after_seq=4, reconnect_timeout=10)
    assert stream.receive(_completed("TRAINING_STATE_SUCCEEDED")) is None
    assert stream.watch().training == "t-1"


def test_a_kind_of_event_from_the_future_is_skipped_but_counted() -> None:
    stream = TrainingStream(training="t-1", reconnect_timeout=10)
    event = training_pb2.TrainingEvent(seq=9, training="t-1")
    assert stream.receive(training_pb2.TrainResponse(event=event)) is None
    assert stream.watch().after_seq == 9
    generation = GenerationStream(generation_pb2.GenerateRequest(), reconnect_timeout=10)
    assert generation.receive(generation_pb2.GenerateResponse()) is None


def test_half_a_picture_is_forgotten_when_the_connection_is_lost(
    make_chunks: Callable[..., list[generation_pb2.GenerateResponse]],
) -> None:
    stream = GenerationStream(generation_pb2.GenerateRequest(), reconnect_timeout=10)
    chunks = make_chunks(0, b"0123456789", 5)
    assert stream.receive(chunks[0]) is None
    stream.lost(UnavailableError("gone"))
    with pytest.raises(DataLossError):
        stream.receive(chunks[1])
    stream.lost(UnavailableError("gone"))
    assert stream.receive(chunks[0]) is None
    image = stream.receive(chunks[1])
    assert isinstance(image, Image)
    assert image.data == b"0123456789"


def test_a_stream_of_pictures_that_ends_early_is_asked_for_again() -> None:
    stream = GenerationStream(generation_pb2.GenerateRequest(), reconnect_timeout=10)
    assert stream.closed() > 0


def test_a_deadline_bounds_the_waits() -> None:
    now = 0.0
    stream = GenerationStream(
        generation_pb2.GenerateRequest(), reconnect_timeout=100, timeout=1.0, clock=lambda: now
    )
    assert stream.remaining() == 1.0
    now = 0.95
    assert stream.lost(UnavailableError("gone", retry_after=5)) == pytest.approx(0.05)
    now = 2.0
    assert stream.remaining() == 0.0


def test_the_server_is_asked_again_after_the_time_it_names(
    server: Any, make_refusal: Callable[..., grpc.Status], monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        server.script.refuse = None

    monkeypatch.setattr("atelier.client.time.sleep", wait)
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromMilliseconds(1500)
    server.script.refuse = make_refusal(grpc.StatusCode.UNAVAILABLE, "not ready", retry)
    with atelier.Client(server.address) as client:
        client.generate("x")
    assert waits[0] == 1.5
