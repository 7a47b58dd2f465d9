"""The tables of the book, and how the file of an earlier server becomes one of today.

`PRAGMA user_version` is the number of the schema. A new one is a new entry of `MIGRATIONS`, written in SQL as
it was then: the tables below go on changing, what has been released does not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from atelier_server.errors import AtelierError

_log = logging.getLogger(__name__)
_schema = sa.MetaData()
trainings = sa.Table(
    "trainings",
    _schema,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("id", sa.String, nullable=False, unique=True),
    sa.Column("request_id", sa.String, unique=True),  # NULL where the client gave none
    sa.Column("recipe_hash", sa.String, nullable=False),
    sa.Column("images_hash", sa.String, nullable=False),
    sa.Column("adapter", sa.String, nullable=False, index=True),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("new_version", sa.Boolean, nullable=False),
    sa.Column("recipe", sa.Text, nullable=False),
    sa.Column("images", sa.Text, nullable=False),
    sa.Column("create_time", sa.Float, nullable=False),
    sa.Column("state", sa.String, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("loss", sa.Float),  # NULL is NaN: SQLite has no other
    sa.Column("last_seq", sa.Integer, nullable=False),
    sa.Column("crash_step", sa.Integer, nullable=False),
    sa.Column("crash_count", sa.Integer, nullable=False),
    sa.Column("interruption", sa.String, nullable=False),
    sa.Column("cancel_requested", sa.Boolean, nullable=False),
    sa.Column("end_time", sa.Float),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("message", sa.String, nullable=False),
    sa.Column("metadata", sa.JSON, nullable=False),
    sa.Column("tenant", sa.String, nullable=False, server_default=""),  # "" is the default tenant
    sa.Index("trainings_of_tenant", "tenant", "number"),
    # A number is never given twice: page tokens and "the latest training" depend on it.
    sqlite_autoincrement=True,
)
events = sa.Table(
    "events",
    _schema,
    sa.Column("training", sa.String, primary_key=True),
    sa.Column("seq", sa.Integer, primary_key=True),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
)
# What was asked for stays counted when its training is deleted.
train_steps = sa.Table(
    "train_steps",
    _schema,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("tenant", sa.String, nullable=False),
    sa.Column("time", sa.Float, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Index("train_steps_of_tenant", "tenant", "time"),
)

# MIGRATIONS[n] makes schema n + 2 of schema n + 1.
MIGRATIONS: tuple[Sequence[str], ...] = (
    (
        "ALTER TABLE trainings ADD COLUMN tenant VARCHAR DEFAULT '' NOT NULL",
        "CREATE INDEX trainings_of_tenant ON trainings (tenant, number)",
        "CREATE TABLE train_steps (number INTEGER NOT NULL, tenant VARCHAR NOT NULL, time FLOAT NOT NULL,"
        " steps INTEGER NOT NULL, PRIMARY KEY (number))",
        "CREATE INDEX train_steps_of_tenant ON train_steps (tenant, time)",
    ),
)
VERSION = len(MIGRATIONS) + 1


class BookTooNew(AtelierError):
    """The file was written by a later version of the server."""


def bring_up_to_date(connection: sa.Connection, path: Path) -> None:
    """Makes the tables, or migrates those of an earlier server, whole or not at all. Raises BookTooNew.

    The file as it was stays beside it, as NAME.db.schema-N.
    """
    found = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
    if found > VERSION:
        raise BookTooNew(f"{path} has schema {found}, of a later server; this one knows {VERSION}")
    if found == VERSION:
        return
    if found:
        kept = path.with_name(f"{path.name}.schema-{found}")
        if not kept.exists():
            connection.exec_driver_sql("VACUUM INTO ?", (str(kept),))
        _log.info("bringing %s from schema %d to %d; as it was: %s", path.name, found, VERSION, kept.name)
    # SQLite's own BEGIN: its driver would commit after every change of a table.
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    if found:
        for statement in (statement for step in MIGRATIONS[found - 1 :] for statement in step):
            connection.exec_driver_sql(statement)
    else:
        _schema.create_all(connection)
    connection.exec_driver_sql(f"PRAGMA user_version={VERSION}")
    connection.commit()
