"""The worker's way to its front: everything arrives, in order, and samples ride along."""

from __future__ import annotations

import socket

import pytest

from atelier_server.messages import JobCancelled, Sample
from atelier_server.workers import wire
from atelier_server.workers.process import Outbox


@pytest.fixture
def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair()


def test_events_arrive_in_order_and_close_writes_the_rest(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    sent = [
        Sample("batch_rows", 1.0),
        JobCancelled("a"),
        Sample("batch_rows", 2.0),
        Sample("batch_rows", 3.0),
    ]
    for event in sent:
        outbox.put(event)
    outbox.close()
    ours.close()
    with theirs, theirs.makefile("rb") as stream:
        assert [wire.read(stream) for _ in sent] == sent
        with pytest.raises(EOFError):
            wire.read(stream)


def test_a_sample_waits_for_an_event(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    outbox = Outbox(ours)
    outbox.put(Sample("batch_rows", 1.0))
    theirs.settimeout(0.05)
    with pytest.raises(TimeoutError):
        theirs.recv(1)
    theirs.settimeout(None)
    outbox.put(JobCancelled("a"))
    with ours, theirs, theirs.makefile("rb") as stream:
        assert [wire.read(stream), wire.read(stream)] == [Sample("batch_rows", 1.0), JobCancelled("a")]


def test_a_front_that_has_gone_does_not_stop_the_device(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    outbox = Outbox(ours)
    outbox.put(JobCancelled("a"))
    outbox.close()
    ours.close()
