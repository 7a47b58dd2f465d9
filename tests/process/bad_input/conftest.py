"""One server for all that is wrong: each test leaves it as good as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from atelier import (
    Client,
)
from tests.process.bad_input.calls import (
    learns,
    paints,
)
from tests.process.server import Server


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("bad-input") / "data")
    try:
        yield running.start()
    finally:
        with suppress(ProcessLookupError):
            running.stop()


@pytest.fixture(scope="package")
def connection(server: Server) -> Iterator[Client]:
    with Client(server.address) as client:
        yield client


@pytest.fixture
def client(connection: Client, server: Server) -> Iterator[Client]:
    """After every test the same worker still paints."""
    worker = server.state["worker_pid"]
    yield connection
    assert paints(connection)
    assert server.state["worker_pid"] == worker


@pytest.fixture(scope="package")
def otto(connection: Client) -> str:
    """An adapter of one step."""
    assert learns(connection, "otto")
    return "otto"
