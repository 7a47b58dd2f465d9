"""The durable book of trainings and their event logs: one SQLite file.

It holds what cannot be rebuilt from the adapter store: who asked for what, and what happened when. Every
call is one transaction. All calls run on one thread of the book's own (`do`), so that they are ordered and
the event loop never waits for the disk.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.pool import StaticPool

from atelier_server.core import State
from atelier_server.errors import RequestIdReused, StorageFull
from atelier_server.jobs.records import (
    LoggedEvent,
    Payload,
    TrainingRecord,
    dump,
    kind_of,
    load_payload,
    load_pictures,
    load_recipe,
)
from atelier_server.jobs.schema import bring_up_to_date, events, train_steps, trainings

P = ParamSpec("P")
T = TypeVar("T")


class Book:
    """The trainings of one data directory. The file is made when it is missing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="book")
        self._engine = sa.create_engine(
            f"sqlite:///{path}", poolclass=StaticPool, connect_args={"check_same_thread": False}
        )
        try:
            self._open(path)
        except BaseException:
            self.close()
            raise

    def _open(self, path: Path) -> None:
        with self._engine.connect() as connection:
            connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            # FULL: what was accepted survives a power cut, not only a crash.
            connection.exec_driver_sql("PRAGMA synchronous=FULL")
            connection.commit()
            bring_up_to_date(connection, path)

    async def do(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Runs one of the methods below on the book's thread. Raises StorageFull."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, partial(function, *args, **kwargs))
        except OperationalError as error:
            if "full" in str(error.orig):
                raise StorageFull("no space left for the book of trainings") from error
            raise

    def close(self) -> None:
        self._thread.submit(self._engine.dispose).result()
        self._thread.shutdown()

    # ----------------------------------------------------------------------------------------- writing
    def insert(self, record: TrainingRecord, *first: Payload) -> TrainingRecord:
        """Writes a new training down with its first events, and counts its steps.

        Raises RequestIdReused if the id is taken.
        """
        values = {item.name: getattr(record, item.name) for item in fields(record) if item.name != "number"}
        values |= _columns(record)
        try:
            with self._engine.begin() as connection:
                connection.execute(trainings.insert().values(**values))
                for payload in first:
                    self._append(connection, record.id, payload, {})
                connection.execute(
                    train_steps.insert().values(
                        tenant=values["tenant"], time=record.create_time, steps=record.recipe.max_train_steps
                    )
                )
        except IntegrityError as error:
            raise RequestIdReused(
                "another training has this request_id or id", name=record.request_id
            ) from error
        return self.training(record.id) or record

    def append(self, training: str, payload: Payload, **changes: Any) -> int:
        """Adds an event to a training's log and changes its record, in one transaction; returns its seq."""
        with self._engine.begin() as connection:
            return self._append(connection, training, payload, changes)

    def update(self, training: str, **changes: Any) -> None:
        with self._engine.begin() as connection:
            connection.execute(trainings.update().where(trainings.c.id == training).values(**changes))

    def requeue(self, training: str) -> None:
        """Its user wants it to go on: what stopped it is forgotten."""
        self.update(
            training,
            state=State.QUEUED,
            interruption="RESUMED",
            cancel_requested=False,
            crash_step=-1,
            crash_count=0,
            end_time=None,
            reason="",
            message="",
            metadata={},
        )

    def delete(self, training: str) -> None:
        with self._engine.begin() as connection:
            connection.execute(events.delete().where(events.c.training == training))
            connection.execute(trainings.delete().where(trainings.c.id == training))

    def interrupt_running(self, reason: str) -> None:
        """After a start of the server: what was running is queued, to be announced as restarted."""
        with self._engine.begin() as connection:
            connection.execute(
                trainings.update()
                .where(trainings.c.state == State.RUNNING)
                .values(state=State.QUEUED, interruption=reason)
            )

    def _append(
        self, connection: sa.Connection, training: str, payload: Payload, changes: dict[str, Any]
    ) -> int:
        query = sa.select(trainings.c.last_seq).where(trainings.c.id == training)
        seq = int(connection.execute(query).scalar_one()) + 1
        connection.execute(
            events.insert().values(
                training=training, seq=seq, time=time.time(), kind=kind_of(payload), payload=dump(payload)
            )
        )
        connection.execute(
            trainings.update().where(trainings.c.id == training).values(last_seq=seq, **changes)
        )
        return seq

    # ----------------------------------------------------------------------------------------- reading
    def training(self, training: str) -> TrainingRecord | None:
        return self._one(trainings.c.id == training)

    def latest(self, adapter: str) -> TrainingRecord | None:
        """The newest training of that adapter."""
        return self._one(trainings.c.adapter == adapter)

    def requested(self, request_id: str) -> TrainingRecord | None:
        return self._one(trainings.c.request_id == request_id) if request_id else None

    def unfinished(self) -> list[TrainingRecord]:
        """Oldest first."""
        states = [state for state in State if not state.ended]
        return self._all(sa.select(trainings).where(trainings.c.state.in_(states)).order_by("number"))

    def ended_before(self, time: float) -> list[str]:
        """Ids of those that ended at or before `time` and have not gone on since."""
        states = [state for state in State if state.ended]
        query = sa.select(trainings.c.id).where(trainings.c.state.in_(states), trainings.c.end_time <= time)
        with self._engine.connect() as connection:
            return [str(row.id) for row in connection.execute(query.order_by("number"))]

    def steps_since(self, tenant: str, time: float) -> list[tuple[float, int]]:
        """When a tenant asked for how many steps, after `time`, oldest first; older ones are forgotten."""
        with self._engine.begin() as connection:
            connection.execute(train_steps.delete().where(train_steps.c.time <= time))
            query = (
                sa.select(train_steps.c.time, train_steps.c.steps)
                .where(train_steps.c.tenant == tenant)
                .order_by(train_steps.c.time)
            )
            return [(float(when), int(steps)) for when, steps in connection.execute(query)]

    def page(self, tenant: str, before: int | None, size: int) -> list[TrainingRecord]:
        """A tenant's, newest first, at most `size`, with numbers below `before`."""
        query = (
            sa.select(trainings)
            .where(trainings.c.tenant == tenant)
            .order_by(trainings.c.number.desc())
            .limit(size)
        )
        return self._all(query if before is None else query.where(trainings.c.number < before))

    def events(self, training: str, after_seq: int, limit: int) -> list[LoggedEvent]:
        query = (
            sa.select(events)
            .where(events.c.training == training, events.c.seq > after_seq)
            .order_by(events.c.seq)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [_event(row) for row in connection.execute(query)]

    def events_of(self, training: str, *kinds: str) -> list[LoggedEvent]:
        query = (
            sa.select(events)
            .where(events.c.training == training, events.c.kind.in_(kinds))
            .order_by(events.c.seq)
        )
        with self._engine.connect() as connection:
            return [_event(row) for row in connection.execute(query)]

    def count_states(self) -> dict[State, int]:
        query = sa.select(trainings.c.state, sa.func.count()).group_by(trainings.c.state)
        with self._engine.connect() as connection:
            return {State(state): int(count) for state, count in connection.execute(query)}

    def _one(self, condition: sa.ColumnElement[bool]) -> TrainingRecord | None:
        found = self._all(sa.select(trainings).where(condition).order_by(trainings.c.number.desc()).limit(1))
        return found[0] if found else None

    def _all(self, query: sa.Select[Any]) -> list[TrainingRecord]:
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query)]


def storage_full(error: BaseException) -> bool:
    """Whether a foreign error says that the disk is full."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _columns(record: TrainingRecord) -> dict[str, Any]:
    """The columns whose form differs from the record's field."""
    return {
        "request_id": record.request_id or None,
        "recipe": dump(record.recipe),
        "images": dump(record.images),
        "metadata": dict(record.metadata),
        "last_seq": 0,
        "tenant": record.adapter.rpartition("/")[0],
    }


def _record(row: sa.Row[Any]) -> TrainingRecord:
    values = dict(row._mapping)
    del values["tenant"]  # told by the adapter's name
    values["request_id"] = values["request_id"] or ""
    values["state"] = State(values["state"])
    values["loss"] = float("nan") if values["loss"] is None else values["loss"]
    values["recipe"] = load_recipe(values["recipe"])
    values["images"] = load_pictures(values["images"])
    values["metadata"] = tuple(values["metadata"].items())
    return TrainingRecord(**values)


def _event(row: sa.Row[Any]) -> LoggedEvent:
    return LoggedEvent(row.training, row.seq, row.time, load_payload(row.kind, row.payload))
