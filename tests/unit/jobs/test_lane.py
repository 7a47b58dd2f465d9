"""The lane: one after another, and patient with a full disk."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from atelier_server.errors import ServerDraining, StorageFull
from atelier_server.jobs import lane as lane_module
from atelier_server.jobs.lane import Lane


@pytest.fixture
async def lane(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lane]:
    monkeypatch.setattr(lane_module, "_RETRY_SECONDS", 0.0)
    lane = Lane()
    lane.start()
    yield lane
    await lane.stop()


def failing(times: int, log: list[str], name: str) -> Callable[[], Awaitable[None]]:
    """An action for which the disk is full so many times."""
    left = times

    async def action() -> None:
        nonlocal left
        if left:
            left -= 1
            raise StorageFull("full")
        log.append(name)

    return action


async def nothing() -> None:
    return None


async def test_things_are_done_in_order_however_often_they_are_tried(lane: Lane) -> None:
    log: list[str] = []
    lane.put(failing(3, log, "first"))
    lane.put(failing(0, log, "second"))
    await lane.call(nothing)
    assert log == ["first", "second"]


async def test_what_matters_little_is_dropped_and_what_matters_most_is_not(lane: Lane) -> None:
    log: list[str] = []
    lane.put(failing(1, log, "progress"), tries=1)
    lane.put(failing(lane_module.TRIES + 40, log, "checkpoint"))
    lane.put(failing(lane_module.TRIES + 40, log, "the end"), tries=None)
    await lane.call(nothing)
    assert log == ["the end"]


async def test_a_lane_that_stops_does_not_wait_for_a_disk(lane: Lane) -> None:
    lane.put(failing(10**9, [], "never"), tries=None)
    await asyncio.wait_for(lane.stop(), 10)


async def test_a_failure_of_another_kind_stops_nothing(lane: Lane) -> None:
    async def broken() -> None:
        raise RuntimeError("odd")

    lane.put(broken)
    with pytest.raises(RuntimeError, match="odd"):
        await lane.call(broken)
    await lane.call(nothing)


async def test_a_lane_that_has_stopped_refuses_instead_of_never_answering(lane: Lane) -> None:
    await lane.stop()
    with pytest.raises(ServerDraining):
        await asyncio.wait_for(lane.call(nothing), 10)
