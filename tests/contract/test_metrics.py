"""What calls leave in the metrics: bounded series, gauges that come down again."""

from __future__ import annotations

import asyncio
import urllib.request

import grpc
import pytest
from prometheus_client import generate_latest

from atelier.v1 import generation_pb2
from tests.contract.conftest import Start
from tests.contract.harness import Service, new_id, refused

HOSTILE = [
    "/atelier.v1.GenerationService/Nothing",
    "/atelier.v1.GenerationService/Generate/../Generate",
    '/atelier.v1.GenerationService/G{code="OK"} 1',
    "/atelier.v1.NoService/Generate",
    "/" + "x" * 5000,
]


def names(service: Service) -> set[str]:
    text = generate_latest(service.application.metrics.registry).decode()
    return {line.rsplit(" ", 1)[0] for line in text.splitlines() if line.startswith("atelier_")}


def value(service: Service, name: str, **labels: str) -> float | None:
    return service.application.metrics.registry.get_sample_value(name, labels)


async def fall(service: Service, name: str, **labels: str) -> None:
    """Waits until a gauge is zero again."""
    async with asyncio.timeout(30):
        while value(service, name, **labels):  # noqa: ASYNC110 - a gauge has no event
            await asyncio.sleep(0.01)


async def appear(service: Service, name: str, **labels: str) -> None:
    """Waits until a gauge has been told once."""
    async with asyncio.timeout(30):
        while value(service, name, **labels) is None:  # noqa: ASYNC110 - a gauge has no event
            await asyncio.sleep(0.01)


async def test_metrics_are_served_over_http(start: Start) -> None:
    service = await start(metrics_port=0)
    url = f"http://127.0.0.1:{service.application.metrics_port}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "atelier_worker_ready 1.0" in text
    assert 'atelier_queue_limit{kind="generate"} 256.0' in text
    assert "process_resident_memory_bytes" in text


@pytest.mark.parametrize("method", HOSTILE)
async def test_what_a_client_writes_is_no_series(service: Service, method: str) -> None:
    await service.generate("a")
    # The worker's first heartbeat brings its memory's series, whoever calls.
    await appear(service, "atelier_vram_bytes", device="cpu", kind="total")
    before = names(service)
    channel = service.channel
    call = channel.unary_unary(method, request_serializer=bytes, response_deserializer=bytes)
    with pytest.raises((grpc.aio.AioRpcError, grpc.aio.UsageError)):
        await call(b"", metadata=(("x-request-id", "my-id"), ("x-tenant", "mine")))
    await service.generate("another prompt", adapters=[], request_id=new_id())
    assert names(service) == before


async def test_a_stream_that_is_dropped_leaves_no_gauge_up(service: Service) -> None:
    call = service.generations.Generate(generation_pb2.GenerateRequest(prompt="hold"))
    await anext(aiter(call))
    assert value(service, "atelier_requests_in_progress", method="Generate") == 1
    call.cancel()
    await fall(service, "atelier_requests_in_progress", method="Generate")
    await fall(service, "atelier_queue_depth", kind="generate")
    counted = value(service, "atelier_request_duration_seconds_count", method="Generate", code="CANCELLED")
    assert counted == 1


async def test_a_refusal_is_counted_once(service: Service) -> None:
    await refused(service.generate("a", num_images=0))
    await fall(service, "atelier_requests_in_progress", method="Generate")
    labels = {"method": "Generate", "code": "INVALID_ARGUMENT"}
    assert value(service, "atelier_request_duration_seconds_count", **labels) == 1


async def test_phases_are_told_of_finished_generations(service: Service) -> None:
    await service.generate("a")
    assert value(service, "atelier_phase_seconds_count", phase="denoise") == 1
    await refused(service.generate("fail"))
    assert value(service, "atelier_phase_seconds_count", phase="denoise") == 1
