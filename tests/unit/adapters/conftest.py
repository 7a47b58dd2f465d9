"""A store in each of the places where one can be: a folder, and a bucket of an S3 server."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier_server.adapters.store import AdapterStore
from tests.s3 import S3Server
from tests.unit.adapters.places import Place


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    server = S3Server().start()
    yield server
    server.kill()


@pytest.fixture
def bucket(s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    for name, value in s3_server.environment().items():
        monkeypatch.setenv(name, value)
    return Place(f"s3://atelier/{uuid.uuid4().hex}", tmp_path)


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place(tmp_path / "adapters", tmp_path)
    found: Place = request.getfixturevalue("bucket")
    return found


@pytest.fixture
def store(place: Place) -> AdapterStore:
    return place.open()
