"""The container's health check, asked of a real health service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from atelier_server.rpc.probe import main

READY = "atelier.v1.GenerationService"


@pytest.fixture
def port() -> Iterator[int]:
    """A health service that is alive and not ready."""
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.SERVING)
    servicer.set(READY, health_pb2.HealthCheckResponse.NOT_SERVING)
    server = grpc.server(ThreadPoolExecutor(1))
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield port
    server.stop(None).wait()


def _announce(folder: Path, **facts: int) -> str:
    (folder / "server.json").write_text(json.dumps(facts))
    return str(folder)


def test_a_server_that_serves(port: int, tmp_path: Path) -> None:
    assert main([_announce(tmp_path, port=port)]) == 0


def test_the_health_port_is_asked_where_there_is_one(port: int, tmp_path: Path) -> None:
    assert main([_announce(tmp_path, port=1, health_port=port)]) == 0


def test_not_ready_is_said(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([_announce(tmp_path, port=port), READY]) == 1
    assert "atelier.v1.GenerationService is NOT_SERVING" in capsys.readouterr().err


def test_nobody_listens(port: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([_announce(tmp_path, port=1)]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


def test_no_server_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 1
    assert f"no server runs on {tmp_path}" in capsys.readouterr().err


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage" in capsys.readouterr().err
