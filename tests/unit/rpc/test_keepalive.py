"""Pings: the server welcomes them as often as our clients send them."""

from __future__ import annotations

import asyncio

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from atelier import channel
from atelier_server.rpc import server as server_module
from atelier_server.rpc.health import Health

FASTER = 100
INTERVAL = "grpc.http2.min_ping_interval_without_data_ms"
TIMES = (INTERVAL, "grpc.keepalive_time_ms")


def faster(options: tuple[tuple[str, str | int], ...]) -> dict[str, str | int]:
    """The intervals a hundredth, so that a test sees many pings; the time for an answer as it is."""
    return {name: int(value) // FASTER if name in TIMES else value for name, value in options}


@pytest.mark.parametrize("welcome", [True, False])
async def test_clients_may_ping_as_often_as_ours_do(welcome: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the server's options gRPC sends such a client away: the control."""
    options = faster(server_module._OPTIONS)
    if not welcome:
        del options[INTERVAL]
    monkeypatch.setattr(server_module, "_OPTIONS", tuple(options.items()))
    server = server_module.build_health_server(Health())
    port = server_module.listen(server, "127.0.0.1", 0)
    await server.start()
    # Zero: ping for ever, also where nothing is said meanwhile.
    pinging = {**faster(channel.OPTIONS), "grpc.http2.max_pings_without_data": 0}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=tuple(pinging.items())) as made:
        call = health_pb2_grpc.HealthStub(made).Watch(health_pb2.HealthCheckRequest())
        await call.read()
        ended = asyncio.create_task(call.code())
        await asyncio.wait((ended,), timeout=3 if welcome else 60)
        assert ended.done() is not welcome
        if not welcome:
            assert "too_many_pings" in (await call.details()).lower().replace(" ", "_")
        call.cancel()
    await server.stop(None)
