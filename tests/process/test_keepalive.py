"""Clients that ping as often as ours do, and as often as the contract allows, are not sent away."""

from __future__ import annotations

import time
from pathlib import Path

import grpc
import pytest

from atelier.v1 import generation_pb2
from atelier.v1.generation_pb2_grpc import GenerationServiceStub
from tests.process.server import FRONT, Server

pytestmark = [pytest.mark.process, pytest.mark.soak]


def test_pings_every_twenty_seconds_on_an_idle_stream(tmp_path: Path) -> None:
    """gRPC sends a client away at the third ping that comes too early."""
    server = Server(tmp_path / "data", module=FRONT).start()
    options = (("grpc.keepalive_time_ms", 20_500), ("grpc.http2.max_pings_without_data", 0))
    with grpc.insecure_channel(server.address, options=options) as channel:
        call = GenerationServiceStub(channel).Generate(generation_pb2.GenerateRequest(prompt="hold"))
        assert next(call).HasField("queued")
        time.sleep(110)  # five pings; what is tested is time itself
        assert call.is_active()
        call.cancel()
    assert server.stop() == 0
