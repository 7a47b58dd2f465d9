"""A book of an earlier server becomes one of today, whole or not at all."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from atelier_server.jobs import schema
from atelier_server.jobs.book import Book
from tests.unit.jobs.test_book import ACCEPTED, record

# The tables as the first release made them.
FIRST = """
CREATE TABLE trainings (
    number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, id VARCHAR NOT NULL, request_id VARCHAR,
    recipe_hash VARCHAR NOT NULL, images_hash VARCHAR NOT NULL, adapter VARCHAR NOT NULL,
    version INTEGER NOT NULL, new_version BOOLEAN NOT NULL, recipe TEXT NOT NULL, images TEXT NOT NULL,
    create_time FLOAT NOT NULL, state VARCHAR NOT NULL, step INTEGER NOT NULL, loss FLOAT,
    last_seq INTEGER NOT NULL, crash_step INTEGER NOT NULL, crash_count INTEGER NOT NULL,
    interruption VARCHAR NOT NULL, cancel_requested BOOLEAN NOT NULL, end_time FLOAT,
    reason VARCHAR NOT NULL, message VARCHAR NOT NULL, metadata JSON NOT NULL,
    UNIQUE (id), UNIQUE (request_id));
CREATE INDEX ix_trainings_adapter ON trainings (adapter);
CREATE TABLE events (
    training VARCHAR NOT NULL, seq INTEGER NOT NULL, time FLOAT NOT NULL, kind VARCHAR NOT NULL,
    payload TEXT NOT NULL, PRIMARY KEY (training, seq));
INSERT INTO trainings VALUES (
    7, 'otto-0007', NULL, 'rh', 'ih', 'otto', 1, 0,
    '{"instance_prompt": "a sks plush", "resolution": 64}', '[{"file": "0000-ab.png", "caption": ""}]',
    12.5, 'running', 3, 0.5, 1, -1, 0, '', 0, NULL, '', '', '{}');
INSERT INTO events VALUES ('otto-0007', 1, 12.5, 'accepted',
    '{"adapter": "otto", "version": 1, "estimated_seconds": 1.0, "estimated_bytes": 2}');
PRAGMA user_version=1;
"""


def first(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(FIRST)


def shape(path: Path) -> dict[str, list[tuple[object, ...]]]:
    """Tables and indexes with their columns, in no order: migrations append."""
    with closing(sqlite3.connect(path)) as connection:
        names = connection.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
        pragma = {"table": "table_info", "index": "index_info"}
        kinds = {"table": slice(1, 4), "index": slice(2, None)}
        return {
            name: sorted(row[kinds[kind]] for row in _rows(connection, pragma[kind], name))
            for kind, name in names.fetchall()
        }


def _rows(connection: sqlite3.Connection, pragma: str, name: str) -> list[tuple[object, ...]]:
    return connection.execute(f"PRAGMA {pragma}({name})").fetchall()


def test_the_first_books_trainings_are_the_default_tenants(tmp_path: Path) -> None:
    path = tmp_path / "atelier.db"
    first(path)
    book = Book(path)
    found = book.training("otto-0007")
    assert found is not None
    assert (found.number, found.step, found.recipe.resolution) == (7, 3, 64)
    assert [event.seq for event in book.events("otto-0007", 0, 9)] == [1]
    assert [r.id for r in book.page("", None, 9)] == ["otto-0007"]
    assert book.page("red", None, 9) == []
    assert book.insert(record(), ACCEPTED).number == 8
    assert book.steps_since("", 0.0) == [(12.5, record().recipe.max_train_steps)]
    book.close()


def test_a_migrated_book_is_as_a_new_one(tmp_path: Path) -> None:
    first(tmp_path / "old.db")
    for name in ("old.db", "new.db"):
        Book(tmp_path / name).close()
    assert shape(tmp_path / "old.db") == shape(tmp_path / "new.db")


def test_the_book_as_it_was_is_kept(tmp_path: Path) -> None:
    first(tmp_path / "atelier.db")
    Book(tmp_path / "atelier.db").close()
    Book(tmp_path / "atelier.db").close()
    with closing(sqlite3.connect(tmp_path / "atelier.db.schema-1")) as kept:
        assert kept.execute("PRAGMA user_version").fetchone() == (1,)
        assert kept.execute("SELECT id FROM trainings").fetchall() == [("otto-0007",)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["atelier.db", "atelier.db.schema-1"]


def test_a_migration_that_fails_leaves_the_book_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "atelier.db"
    first(path)
    before = shape(path)
    monkeypatch.setattr(schema, "MIGRATIONS", ((*schema.MIGRATIONS[0], "DROP TABLE no_such_table"),))
    with pytest.raises(sa.exc.OperationalError, match="no_such_table"):
        Book(path)
    assert shape(path) == before
    monkeypatch.undo()
    Book(path).close()


def test_tenants_trainings_are_kept_apart(tmp_path: Path) -> None:
    book = Book(tmp_path / "atelier.db")
    book.insert(record("otto-0001", "a"), ACCEPTED)
    scoped = record("red/otto-0001", "red/a")
    book.insert(replace(scoped, adapter="red/otto"), ACCEPTED)
    assert [r.id for r in book.page("red", None, 9)] == ["red/otto-0001"]
    assert [r.id for r in book.page("", None, 9)] == ["otto-0001"]
    assert len(book.steps_since("red", 0.0)) == 1
    assert book.steps_since("red", 100.0) == []
    book.delete("red/otto-0001")
    assert book.page("red", None, 9) == []
    book.close()
