"""Pictures that nobody may ask for again are let go at once, not when the garbage is collected."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator

import pytest

from atelier.v1 import generation_pb2
from atelier_server.jobs.generation import Generation
from tests.contract.harness import Service


@pytest.fixture
def no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def _generations() -> int:
    return sum(type(thing) is Generation for thing in gc.get_objects())


async def _gone() -> None:
    async with asyncio.timeout(30):
        while _generations():  # noqa: ASYNC110 - nobody tells that something is freed
            await asyncio.sleep(0.05)


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_stream_that_was_read_leaves_nothing(service: Service) -> None:
    for _ in range(3):
        assert len(await service.generate("big")) > 3
    await _gone()


@pytest.mark.usefixtures("no_garbage_collection")
async def test_a_stream_that_was_dropped_leaves_nothing(service: Service) -> None:
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    await anext(aiter(call))
    assert _generations() == 1
    call.cancel()
    await _gone()
