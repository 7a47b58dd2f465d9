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
def untaught(client: Client) -> tuple[Likeness, Likeness]:
    """What the base makes of a blue plush octopus, and of the words that it is going to be taught."""
    plain, subject = (looked_at(client, "", words)[0] for words in (PLAIN, SUBJECT))
    return plain, subject


@pytest.mark.parametrize("method", METHODS)
def test_the_subject_is_learned(client: Client, untaught: tuple[Likeness, Likeness], method: str) -> None:
    """By colours he is nearer than the base's best try. The scorer, to which any blue octopus is nearly as
    near, tells whether the words mean him better than before."""
    plain, subject = untaught
    [adapter] = teach(client, method, METHODS[method])
    after, _ = looked_at(client, adapter, SUBJECT)
    print(f"{method}: {plain} and {subject} before, {after} after")
    assert after.colours > 1.2 * max(plain.colours, subject.colours)
    assert after.scorer > subject.scorer
