"""Every method teaches Otto to the embedded model: pictures of him become like those that were held out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import pytest

from atelier import Client
from tests.process.otto import METHODS, PLAIN, SUBJECT, Likeness, looked_at, teach
from tests.process.server import Server

pytestmark = [pytest.mark.process, pytest.mark.soak, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    server = Server(tmp_path_factory.mktemp("otto") / "data").start()
    try:
        with Client(server.address) as client:
            yield client
    finally:
        with suppress(ProcessLookupError):
            server.stop()


@pytest.fixture(scope="module")
def before(client: Client) -> Likeness:
    """The best that the base makes of a blue plush octopus, and of words that it does not know."""
    tries = [looked_at(client, "", words)[0] for words in (PLAIN, SUBJECT)]
    return Likeness(max(one.colours for one in tries), max(one.scorer for one in tries))


@pytest.mark.parametrize("method", METHODS)
def test_the_subject_is_learned(client: Client, before: Likeness, method: str) -> None:
    [adapter] = teach(client, method, METHODS[method])
    after, _ = looked_at(client, adapter, SUBJECT)
    print(f"{method}: {before} before, {after} after")
    assert after.colours > 1.2 * before.colours
    assert after.scorer > before.scorer
