"""A thousand streams at once: admitted up to the limit, the rest refused at once and told when to return."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status

from atelier.v1 import generation_pb2, generation_pb2_grpc
from benchmarks.load import quantile
from tests.process.server import Server

pytestmark = [pytest.mark.process, pytest.mark.soak]
LIMIT = 64


async def _health(channel: grpc.aio.Channel, done: asyncio.Event) -> list[float]:
    """Seconds of health checks, as many as can be asked one after the other."""
    check = channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )
    taken = []
    while not done.is_set():
        before = time.perf_counter()
        await check(health_pb2.HealthCheckRequest(), timeout=30)
        taken.append(time.perf_counter() - before)
        await asyncio.sleep(0.02)
    return taken


def _retry_seconds(error: grpc.aio.AioRpcError) -> float:
    status = rpc_status.from_call(error)
    assert status is not None
    retry = error_details_pb2.RetryInfo()
    assert any(detail.Unpack(retry) for detail in status.details), status
    return retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9


@dataclass
class Storm:
    """Codes of the calls; of those refused the seconds until they were, and those to come back after."""

    codes: Counter[str] = field(default_factory=Counter)
    refused_after: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)
    health: list[float] = field(default_factory=list)


async def _storm(server: Server, count: int) -> Storm:
    """`count` calls at once, and health checks meanwhile."""
    request = generation_pb2.GenerateRequest(prompt="a boat", num_inference_steps=2, guidance_scale=1.0)
    storm = Storm()
    async with (
        grpc.aio.insecure_channel(server.address) as channel,
        grpc.aio.insecure_channel(server.address, options=[("grpc.use_local_subchannel_pool", 1)]) as aside,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)

        async def one() -> None:
            began = time.perf_counter()
            try:
                events = [message.WhichOneof("event") async for message in stub.Generate(request)]
            except grpc.aio.AioRpcError as error:
                storm.codes[error.code().name] += 1
                storm.refused_after.append(time.perf_counter() - began)
                storm.delays.append(_retry_seconds(error))
            else:
                storm.codes["OK"] += 1
                assert events[-1] == "completed"

        done = asyncio.Event()
        checking = asyncio.create_task(_health(aside, done))
        await asyncio.gather(*(one() for _ in range(count)))
        done.set()
        storm.health = await checking
    return storm


def _storm_holds(server: Server, count: int) -> Storm:
    storm = asyncio.run(_storm(server, count))
    codes = storm.codes
    assert set(codes) == {"OK", "RESOURCE_EXHAUSTED"}
    assert codes["OK"] >= LIMIT  # those that came later may have found room again
    assert codes["RESOURCE_EXHAUSTED"] > 0
    assert min(storm.delays) > 0
    counted = server.metrics()
    prefix = "atelier_request_duration_seconds_count"
    for code, number in codes.items():
        assert counted[f'{prefix}{{code="{code}",method="Generate"}}'] == number
    assert counted['atelier_queue_depth{kind="generate"}'] == 0
    assert counted['atelier_requests_in_progress{method="Generate"}'] == 0
    return storm


@pytest.fixture
def narrow(tmp_path: Path) -> Iterator[Server]:
    """A server that takes LIMIT generations."""
    server = Server(tmp_path / "data", f"--limits.max-queued-generations={LIMIT}").start()
    yield server
    assert server.stop() == 0


def test_a_thousand_streams(narrow: Server) -> None:
    storm = _storm_holds(narrow, 1000)
    assert quantile(sorted(storm.health), 0.99) < 0.1
    assert max(storm.refused_after) < 5  # a thousand handshakes of streams in one process, and no work
