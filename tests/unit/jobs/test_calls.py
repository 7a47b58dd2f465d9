"""Calls to the worker: their progress is told, and a caller that goes away ends them."""

from __future__ import annotations

import asyncio

import pytest

from atelier_server.core import CheckpointId
from atelier_server.jobs.calls import Calls
from atelier_server.messages import AbandonCall, AdapterMade, CallProgress, Command, ExtractAdapter
from atelier_server.report import PublishAs

TARGET = PublishAs("n", False, "")


def extract(call_id: str) -> ExtractAdapter:
    return ExtractAdapter(call_id, "tuned", "", 4, TARGET, public=False)


async def test_progress_is_told_until_the_answer() -> None:
    sent: list[Command] = []
    calls = Calls(sent.append)
    calls.worker_ready()
    told: list[tuple[int, int]] = []
    task = asyncio.create_task(calls.call(extract, AdapterMade, lambda *both: told.append(both)))
    await asyncio.sleep(0)
    [command] = sent
    assert isinstance(command, ExtractAdapter)
    calls.handle(CallProgress(command.call_id, 1, 3))
    calls.handle(CallProgress("another", 2, 3))
    answer = AdapterMade(command.call_id, CheckpointId("n", 1, 0), 0.5)
    calls.handle(answer)
    assert await task is answer
    calls.handle(CallProgress(command.call_id, 3, 3))
    assert told == [(1, 3)]
    assert sent == [command]


async def test_a_caller_that_goes_away_ends_its_call() -> None:
    sent: list[Command] = []
    calls = Calls(sent.append)
    calls.worker_ready()
    task = asyncio.create_task(calls.call(extract, AdapterMade))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(command) for command in sent] == [ExtractAdapter, AbandonCall]
    assert (
        len({command.call_id for command in sent if isinstance(command, ExtractAdapter | AbandonCall)}) == 1
    )
