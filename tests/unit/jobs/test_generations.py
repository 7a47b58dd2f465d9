"""Generations without a worker: barriers, the store of results, slow readers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from atelier_server.access.tenants import Tenant
from atelier_server.config import Quotas
from atelier_server.core import GenerationJob, Mode
from atelier_server.errors import QueueFull, QuotaExceeded, RequestIdReused, ServerDraining, WorkerLost
from atelier_server.jobs.generation import Reader
from atelier_server.jobs.generations import Generations
from atelier_server.messages import (
    Cancel,
    Command,
    GenerationCompleted,
    ImageReady,
    PreviewReady,
    Progress,
    Queued,
    Submit,
    Timings,
)
from atelier_server.metrics import Metrics

JOB = GenerationJob("a", "", "", (), 0, 2, 10, 7.5, "ddim", 64, 64, Mode.FAST, 0)


class Front:
    def __init__(self, **options: int) -> None:
        self.sent: list[Command] = []
        self.now = 0.0
        self.tenant = Tenant()
        self.generations = Generations(
            self.sent.append, Metrics(), limit=9, clock=lambda: self.now, **options
        )
        self.generations.worker_ready()

    def admit(self, name: str, request_id: str = "") -> Reader:
        return self.generations.admit(replace(JOB, id=name), request_id, "hash", self.tenant)

    def submitted(self) -> list[str]:
        found = [c.job.id for c in self.sent if isinstance(c, Submit)]
        self.sent.clear()
        return found

    def crash(self) -> bool:
        blamed = self.generations.worker_lost()
        self.generations.worker_ready()
        return blamed

    def finish(self, name: str, size: int = 1) -> None:
        self.generations.handle(ImageReady(name, 0, 0, "image/png", bytes(size)))
        self.generations.handle(GenerationCompleted(name, Timings(), 2))


async def drain(reader: Reader) -> list[object]:
    return [event async for event in reader.events()]


async def test_a_slow_reader_gets_the_latest_progress_and_every_picture() -> None:
    front = Front()
    reader = front.admit("a")
    for step in range(1, 11):
        front.generations.handle(Progress("a", step, 10))
    front.finish("a")
    events = await drain(reader)
    assert [type(e) for e in events] == [Queued, Progress, ImageReady, GenerationCompleted]
    assert events[1] == Progress("a", 10, 10)


async def test_only_the_latest_preview_is_kept_and_none_after_the_picture() -> None:
    front = Front()
    reader = front.admit("a")
    for step in (2, 4, 6):
        front.generations.handle(PreviewReady("a", 0, step, "image/png", b"0"))
        front.generations.handle(PreviewReady("a", 1, step, "image/png", b"1"))
    front.generations.handle(ImageReady("a", 1, 1, "image/png", b"done"))
    front.generations.handle(PreviewReady("a", 1, 8, "image/png", b"late"))
    front.finish("a")
    previews = [event for event in await drain(reader) if isinstance(event, PreviewReady)]
    assert [(event.index, event.step) for event in previews] == []
    early = front.admit("b")
    for step in (2, 4):
        front.generations.handle(PreviewReady("b", 0, step, "image/png", b"0"))
    events = early.events()
    assert [await anext(events), await anext(events)][1] == PreviewReady("b", 0, 4, "image/png", b"0")


async def test_the_last_try_is_alone_in_both_directions() -> None:
    front = Front()
    readers = {name: front.admit(name) for name in "abc"}
    assert front.submitted() == ["a", "b", "c"]
    assert front.crash() is False
    assert front.submitted() == ["a", "b", "c"]
    front.finish("c")
    assert front.crash() is False
    assert front.submitted() == ["a"]
    readers["d"] = front.admit("d")
    assert front.submitted() == []
    assert front.crash() is True
    assert front.submitted() == ["b"]
    with pytest.raises(WorkerLost):
        await drain(readers["a"])
    front.finish("b")
    assert front.submitted() == ["d"]


async def test_those_who_wait_for_being_alone_let_earlier_ones_finish() -> None:
    front = Front()
    front.admit("a")
    front.crash()
    front.admit("b")
    front.crash()
    front.submitted()
    front.generations.worker_ready()
    assert [g.job.id for g in front.generations._live.values() if g.submitted] == ["a"]
    front.finish("a")
    assert front.submitted() == ["b"]


async def test_results_are_kept_for_a_while_within_bytes() -> None:
    front = Front(keep_bytes=5000)
    front.admit("a", "1")
    front.finish("a", 6)
    assert front.generations.join("1", "hash")
    with pytest.raises(RequestIdReused):
        front.generations.join("1", "other")
    front.admit("b", "2")
    front.finish("b", 6)
    assert front.generations.join("1", "hash") is None
    assert front.generations.join("2", "hash")
    front.now = 15 * 60
    assert front.generations.join("2", "hash") is None


async def test_closing_twice_cancels_once() -> None:
    front = Front()
    reader = front.admit("a")
    reader.close()
    reader.close()
    assert front.sent[1:] == [Cancel("a")]
    assert front.generations.idle.is_set()


async def test_a_drain_ends_what_no_worker_has() -> None:
    front = Front()
    front.admit("a")
    front.generations.worker_lost()
    reader = Reader(front.generations._live["a"], lambda _: None)
    front.generations.drain_waiting()
    with pytest.raises(ServerDraining):
        await drain(reader)
    with pytest.raises(ServerDraining):
        front.admit("b")


def test_a_tenants_pictures_are_bounded_and_anothers_are_not() -> None:
    front = Front()
    front.tenant = Tenant("red", Quotas(max_images=5))
    front.admit("a")
    front.admit("b")
    with pytest.raises(QuotaExceeded, match=r"may have 5 images .* has 4") as caught:
        front.admit("c")
    assert caught.value.retry_after_seconds
    front.finish("a")
    front.admit("c")
    front.tenant = Tenant("blue", Quotas(max_images=2))
    front.admit("d")


def test_a_crowd_keeps_nobody_else_out() -> None:
    front = Front()
    for number in range(9):
        front.admit(f"red-{number}")
    with pytest.raises(QueueFull):
        front.admit("red-9")
    front.tenant = Tenant("blue")
    front.admit("blue-0")
    with pytest.raises(QueueFull):
        front.admit("blue-1")
