"""Fixtures of the client's tests: a scripted server on a real channel, refusals, pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2

from tests.unit.client.scripted_server import Response, Script, ScriptedServer, image_chunks, picture, refusal


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    running = ScriptedServer(Script())
    running.start()
    yield running
    running.stop()


@pytest.fixture
def make_refusal() -> Callable[..., grpc.Status]:
    return refusal


@pytest.fixture
def full_refusal() -> grpc.Status:
    """INVALID_ARGUMENT with every kind of detail."""
    return refusal(
        grpc.StatusCode.INVALID_ARGUMENT,
        "width: must be a multiple of 8; seed: must not be negative",
        error_details_pb2.ErrorInfo(reason="INVALID_REQUEST", domain="atelier", metadata={"step": "7"}),
        error_details_pb2.BadRequest(
            field_violations=[
                {"field": "width", "description": "must be a multiple of 8"},
                {"field": "seed", "description": "must not be negative"},
            ]
        ),
        error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=2, nanos=500_000_000)),
        error_details_pb2.ResourceInfo(resource_type="adapter", resource_name="otto"),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one with a caption, and things that are none."""
    root = tmp_path / "pictures"
    root.mkdir()
    (root / "b.png").write_bytes(picture())
    (root / "a.PNG").write_bytes(picture((1, 2, 3)))
    (root / "b.txt").write_text("a sks octopus\n", encoding="utf-8")
    (root / "notes.md").write_text("no picture", encoding="utf-8")
    return root


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
    return picture


@pytest.fixture
def make_chunks() -> Callable[..., list[Response]]:
    return image_chunks
