"""Fixtures of the contract tests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.contract.harness import Service, Start, running


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Start]:
    async with AsyncExitStack() as stack:

        async def start(**fields: object) -> Service:
            return await stack.enter_async_context(running(tmp_path / "data", **fields))

        yield start


@pytest.fixture
async def service(start: Start) -> Service:
    return await start()
