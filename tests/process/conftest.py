"""Servers that end with their test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.process.server import Server


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A running server of the test's own."""
    running = Server(tmp_path / "data")
    try:
        yield running.start()
    finally:
        with suppress(ProcessLookupError):
            running.stop()
