"""The book of trainings."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from atelier_server.core import Recipe, State
from atelier_server.errors import RequestIdReused
from atelier_server.jobs.book import Book
from atelier_server.jobs.records import (
    Accepted,
    Checkpointed,
    Completed,
    Payload,
    Picture,
    Progressed,
    Restarted,
    Sampled,
    TrainingRecord,
    Warned,
)
from atelier_server.jobs.schema import VERSION, BookTooNew

ACCEPTED = Accepted("otto", 1, 2.5, 10**10)
PAYLOADS: list[Payload] = [
    Progressed(1, 10, 0.5, 1e-4, 3.0),
    Checkpointed(5, "otto@5", "ab", 123, 0.25),
    Sampled(5, 0, "a", 2**64 - 1, "image/png", "000005-0.png"),
    Warned("R", "m"),
    Restarted(5, "WORKER_LOST"),
    Completed(State.FAILED, 6, "otto@5", 1.5, "NONFINITE_LOSS", "m", (("step", "6"),)),
]


def record(name: str = "otto-0001", request_id: str = "r") -> TrainingRecord:
    recipe = Recipe("a sks plush", 64, validation_prompts=("x", "y"), seed=2**64 - 1, snr_gamma=5.0)
    pictures = (Picture("0000-ab.png", "caption"), Picture("0001-cd.jpeg", ""))
    return TrainingRecord(name, request_id, "rh", "ih", "otto", 1, False, recipe, pictures, 12.5)


@pytest.fixture
def book(tmp_path: Path) -> Iterator[Book]:
    book = Book(tmp_path / "atelier.db")
    yield book
    book.close()


def test_what_is_written_is_read(book: Book) -> None:
    written = book.insert(record(), ACCEPTED)
    assert written == book.training("otto-0001") == book.latest("otto") == book.requested("r")
    assert (written.recipe, written.images) == (record().recipe, record().images)
    assert (written.number, written.last_seq, written.state) == (1, 1, State.QUEUED)
    assert [book.append("otto-0001", payload) for payload in PAYLOADS] == [2, 3, 4, 5, 6, 7]
    events = book.events("otto-0001", 0, 100)
    assert [event.payload for event in events] == [ACCEPTED, *PAYLOADS]
    assert [event.seq for event in book.events("otto-0001", 3, 2)] == [4, 5]
    assert [event.payload for event in book.events_of("otto-0001", "sample")] == [PAYLOADS[2]]


def test_an_event_and_its_change_are_one(book: Book) -> None:
    book.insert(record(), ACCEPTED)
    with pytest.raises(Exception, match="no_such_column"):
        book.append("otto-0001", PAYLOADS[0], no_such_column=1)
    found = book.training("otto-0001")
    assert found
    assert found.last_seq == 1
    book.append("otto-0001", PAYLOADS[-1], state=State.FAILED, metadata={"step": "6"}, loss=None)
    found = book.training("otto-0001")
    assert found
    assert (found.state, found.last_seq, found.metadata) == (State.FAILED, 2, (("step", "6"),))
    assert math.isnan(found.loss)


def test_request_ids_are_unique_and_may_be_missing(book: Book) -> None:
    book.insert(record(), ACCEPTED)
    with pytest.raises(RequestIdReused):
        book.insert(record("otto-0002"), ACCEPTED)
    book.insert(record("otto-0003", ""), ACCEPTED)
    book.insert(record("otto-0004", ""), ACCEPTED)
    assert book.requested("") is None


def test_pages_counts_and_deletion(book: Book) -> None:
    for i in range(5):
        book.insert(record(f"otto-{i}", ""), ACCEPTED)
    assert [r.id for r in book.page("", None, 2)] == ["otto-4", "otto-3"]
    assert [r.id for r in book.page("", 4, 10)] == ["otto-2", "otto-1", "otto-0"]
    book.update("otto-1", state=State.RUNNING)
    book.update("otto-2", state=State.SUCCEEDED)
    assert book.count_states() == {State.QUEUED: 3, State.RUNNING: 1, State.SUCCEEDED: 1}
    book.interrupt_running("SERVER_RESTARTED")
    assert [(r.id, r.interruption) for r in book.unfinished()] == [
        ("otto-0", ""),
        ("otto-1", "SERVER_RESTARTED"),
        ("otto-3", ""),
        ("otto-4", ""),
    ]
    book.delete("otto-4")
    assert book.training("otto-4") is None
    assert book.events("otto-4", 0, 10) == []
    assert book.insert(record("otto-5", ""), ACCEPTED).number == 6


def test_it_survives_and_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    path = tmp_path / "atelier.db"
    book = Book(path)
    book.insert(record(), ACCEPTED)
    book.close()
    book = Book(path)
    assert book.training("otto-0001")
    book.close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version={VERSION + 1}")
    connection.close()
    with pytest.raises(BookTooNew):
        Book(path)
