"""How the service behaves when there is too much, too slow, or nothing at all."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from atelier import AsyncClient, Completed, Progress, Queued, ServerInfo
from atelier.errors import UnavailableError
from atelier.v1 import generation_pb2, server_pb2
from atelier_server.config import Limits
from tests.contract.harness import Service, Start, kinds, picture, refused, train_requests


async def holding(service: Service) -> Any:
    """A generation that is being painted until somebody releases it."""
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    async for message in call:
        if message.WhichOneof("event") == "progress":
            return call
    raise AssertionError


async def until(condition: Callable[[], bool]) -> None:
    """Looks again and again; the caller bounds the time."""
    while True:
        if condition():
            return
        await asyncio.sleep(0.01)


def ended(service: Service, method: str, code: str) -> float:
    """How many calls have ended so."""
    labels = {"method": method, "code": code}
    registry = service.application.metrics.registry
    return registry.get_sample_value("atelier_request_duration_seconds_count", labels) or 0.0


# ------------------------------------------------------------------------------------------- too many
async def test_calls_beyond_the_limit_are_refused_at_once_by_class(start: Start) -> None:
    limits = Limits(max_generate_calls=2, max_train_calls=1, max_control_calls=1)
    service = await start(limits=limits)
    held = [await holding(service) for _ in range(2)]
    told = await refused(service.generate("x"))
    assert (told.code, told.reason) == ("RESOURCE_EXHAUSTED", "TOO_MANY_CALLS")
    assert told.retry_seconds == 1
    assert told.metadata == {"class": "generate", "limit": "2"}
    # Other classes have their own room.
    assert (await service.server.GetServerInfo(server_pb2.GetServerInfoRequest())).ready
    watched = service.trainings.Train(iter(train_requests(instance_prompt="hold", max_train_steps=9)))
    assert (await anext(aiter(watched))).event.HasField("accepted")
    assert (await refused(service.watch("otto"))).reason == "TOO_MANY_CALLS"
    watched.cancel()
    for call in held:
        call.cancel()
    await service.application.generations.idle.wait()
    assert kinds(await service.generate("x"))[-1] == "completed"


async def test_a_crowd_is_admitted_up_to_the_limit_and_the_rest_refused_with_a_time(start: Start) -> None:
    service = await start(limits=Limits(max_queued_generations=20, max_generate_calls=40))
    first = await holding(service)
    refusals: asyncio.Queue[tuple[str, str, int | None]] = asyncio.Queue()

    async def one() -> None:
        refusal = await refused(service.generate("hold"))
        refusals.put_nowait((refusal.code, refusal.reason, refusal.retry_seconds))

    crowd = [asyncio.create_task(one()) for _ in range(150)]
    async with asyncio.timeout(60):
        for _ in range(150 - 19):
            code, reason, retry = await refusals.get()
            assert code == "RESOURCE_EXHAUSTED"
            assert reason in ("QUEUE_FULL", "TOO_MANY_CALLS")
            assert retry
    for task in crowd:
        task.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)
    first.cancel()


async def test_uploads_under_way_are_bounded(start: Start, tmp_path: Path) -> None:
    service = await start(limits=Limits(max_uploads=1))
    *most, last = train_requests(picture(), picture(), name="slow")
    finish = asyncio.Event()

    async def slowly() -> Any:
        for message in most:
            yield message
        await finish.wait()
        yield last

    slow = service.trainings.Train(slowly())
    async with asyncio.timeout(30):
        await until(lambda: any((tmp_path / "data" / "uploads").glob("*/*.png")))
        told = await refused(service.train(name="fast"))
        assert (told.reason, told.retry_seconds) == ("TOO_MANY_UPLOADS", 5)
        finish.set()
        events = [message.event async for message in slow]
    assert events[-1].HasField("completed")
    assert (await service.train(name="fast"))[-1].HasField("completed")


async def test_limits_and_quotas_are_told(start: Start) -> None:
    service = await start(limits=Limits(max_uploads=3))
    async with AsyncClient(f"127.0.0.1:{service.application.port}") as client:
        info = await client.server_info()
    assert isinstance(info, ServerInfo)
    assert (info.limits.max_uploads, info.limits.max_generate_calls) == (3, 512)
    assert (info.tenant, info.quotas.max_images) == ("default", None)


# ------------------------------------------------------------------------------------------- too slow
async def test_who_does_not_read_loses_the_stream_and_nothing_else(start: Start) -> None:
    service = await start(slow_reader_seconds=0.3)
    slow = service.generations.Generate(generation_pb2.GenerateRequest(prompt="big", num_images=16))
    async with asyncio.timeout(60):
        assert (await slow.read()).HasField("queued")
        # Nobody reads on: 48 MiB do not fit into what gRPC holds for a stream.
        await service.application.generations.idle.wait()
        await until(lambda: ended(service, "Generate", "RESOURCE_EXHAUSTED") == 1)
        assert kinds(await service.generate("x"))[-1] == "completed"
        # What was on its way is still read, then the status.
        refusal = await refused(read_on(slow))
    assert (refusal.code, refusal.reason) == ("RESOURCE_EXHAUSTED", "SLOW_CONSUMER")
    assert "nothing of this stream was read for 0.3 s" in refusal.message


async def read_on(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_reader_that_is_slow_but_reads_gets_everything(start: Start) -> None:
    # Far above what the reader takes for a whole window, which gRPC widens to many messages.
    service = await start(slow_reader_seconds=30.0)
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="big", num_images=8))
    images = 0
    async for message in call:
        await asyncio.sleep(0.1)
        images += message.WhichOneof("event") == "image" and message.image.last
    assert images == 8


# ---------------------------------------------------------------------------------------- nothing moves
@pytest.mark.parametrize("prompt", ["hang-once", "freeze-once"])
async def test_a_worker_that_gets_nowhere_is_replaced_and_its_work_done_again(
    start: Start, prompt: str
) -> None:
    service = await start(stall_seconds=4.0)
    async with AsyncClient(f"127.0.0.1:{service.application.port}") as client, asyncio.timeout(60):
        events = [event async for event in client.generate_stream(prompt)]
    assert isinstance(events[-1], Completed)
    assert events[-1].timings.restarts == 1
    value = service.application.metrics.registry.get_sample_value(
        "atelier_worker_restarts_total", {"reason": "stalled"}
    )
    assert value == 1


# -------------------------------------------------------------------------------------------- it leaves
async def test_a_drain_finishes_what_has_begun_and_refuses_the_rest(start: Start) -> None:
    service = await start(drain_seconds=30.0)
    application = service.application
    async with AsyncClient(f"127.0.0.1:{application.port}", reconnect_timeout=0) as client:
        begun = client.generate_stream("hold")
        async for event in begun:
            if isinstance(event, Progress):
                break
        waiting = client.generate_stream("wait")
        assert isinstance(await anext(waiting), Queued)
        application.leave()
        with pytest.raises(UnavailableError) as caught:
            await anext(waiting)
        assert (caught.value.reason, caught.value.retry_after) == ("SERVER_DRAINING", 5)
        with pytest.raises(UnavailableError) as caught:
            await client.generate("new")
        assert caught.value.reason == "SERVER_DRAINING"
        application.leave()  # once more: what has begun is not waited for
        with pytest.raises(UnavailableError) as caught:
            await anext(begun)
        assert caught.value.reason == "SERVER_DRAINING"
        async with asyncio.timeout(20):
            await service.serving


async def test_with_notice_it_serves_while_it_says_that_it_leaves(start: Start) -> None:
    service = await start(drain_notice_seconds=60.0)
    service.application.leave()
    await service.until(2)  # NOT_SERVING
    await service.until(2, "")
    assert kinds(await service.generate("x"))[-1] == "completed"
    service.application.leave()
    async with asyncio.timeout(20):
        await service.serving


async def test_a_connection_is_asked_to_go_when_it_is_old(start: Start) -> None:
    service = await start(connection_age_seconds=0.2)
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{service.application.port}")
    async with asyncio.timeout(30), channel:
        await channel.channel_ready()
        await channel.wait_for_state_change(grpc.ChannelConnectivity.READY)
    # Nobody notices: the next call connects anew.
    async with AsyncClient(f"127.0.0.1:{service.application.port}") as client:
        for _ in range(3):
            assert (await client.generate("x")).images
