"""The worker's way to its front: everything arrives, in order, and samples ride along."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.host import HostTier
from atelier_server.engine.residency import Residency
from atelier_server.engine.runner import Memory
from atelier_server.engine.scheduler import Scheduler
from atelier_server.messages import AdapterLoaded, Heartbeat, JobCancelled, Sample
from atelier_server.workers import wire
from atelier_server.workers.process import Outbox, Pulse
from tests.fakes import use


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


class Desk:
    """As much of a loop and a runner as a heartbeat tells."""

    def __init__(self) -> None:
        self.turns, self.idle = 0, True
        self.scheduler = Scheduler(Residency(1))
        self.trainings = SimpleNamespace(live={})
        self.residency = Residency(1)
        self.host = HostTier(lambda use: CanonicalAdapter({}), 0)

    def memory(self) -> Memory:
        return Memory(0, 0, 0)


def test_a_change_of_slots_is_told_before_what_follows_from_it(
    pair: tuple[socket.socket, socket.socket],
) -> None:
    ours, theirs = pair
    desk, outbox = Desk(), Outbox(ours)
    pulse = Pulse(desk, desk, outbox)  # type: ignore[arg-type]
    loaded, other = AdapterLoaded("call", True), JobCancelled("a")
    desk.residency.acquire(use("otto").checkpoint, frozenset())
    for event in (other, loaded, loaded):
        pulse.before(event)
        outbox.put(event)
    outbox.close()
    ours.close()
    with theirs, theirs.makefile("rb") as stream:
        told = [wire.read(stream) for _ in range(4)]
    assert isinstance(told[1], Heartbeat)
    assert told[1].resident == (use("otto").checkpoint,)
    assert [told[0], *told[2:]] == [other, loaded, loaded]


def test_a_front_that_has_gone_does_not_stop_the_device(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    theirs.close()
    outbox = Outbox(ours)
    outbox.put(JobCancelled("a"))
    outbox.close()
    ours.close()
