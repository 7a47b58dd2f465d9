"""A worker that gets nowhere is noticed; one that is idle, slow or starting is left alone."""

from __future__ import annotations

from atelier_server.jobs.watchdog import Watchdog
from atelier_server.messages import Heartbeat


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def beat(turns: int, *, idle: bool = False) -> Heartbeat:
    return Heartbeat(0, 0, 0, (), 0, 0, 0, turns=turns, idle=idle)


def test_a_step_that_never_ends_is_noticed() -> None:
    clock = Clock()
    dog = Watchdog(60, clock)
    dog.begin()
    for turns in range(5):  # each step takes 50 s
        for _ in range(50):
            clock.now += 1
            dog.heard(beat(turns))
            assert not dog.stalled()
    for _ in range(60):
        clock.now += 1
        dog.heard(beat(4))
    assert "its step has taken" in dog.stalled()


def test_silence_is_noticed() -> None:
    clock = Clock()
    dog = Watchdog(60, clock)
    dog.begin()
    clock.now += 59
    assert not dog.stalled()
    clock.now += 2
    assert "nothing was heard of it for 61.0 s" in dog.stalled()


def test_an_idle_worker_is_left_alone_for_ever() -> None:
    clock = Clock()
    dog = Watchdog(60, clock)
    dog.begin()
    for _ in range(1000):
        clock.now += 1
        dog.heard(beat(7, idle=True))
        assert not dog.stalled()


def test_the_next_worker_begins_afresh() -> None:
    clock = Clock()
    dog = Watchdog(60, clock)
    dog.begin()
    clock.now += 1000
    assert dog.stalled()
    dog.begin()
    dog.heard(beat(-1))
    assert not dog.stalled()


def test_nought_means_never() -> None:
    clock = Clock()
    dog = Watchdog(0, clock)
    clock.now += 10**9
    assert not dog.stalled()
