"""How long people's pictures are kept: by the book, an injected clock, and nothing that nobody knows of."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from atelier_server.core import Recipe, State
from atelier_server.jobs.book import Book
from atelier_server.jobs.records import Accepted, Picture, TrainingRecord
from atelier_server.jobs.retention import Retention
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.trainings import Trainings

DAY = 86400.0
RECORD = TrainingRecord(
    *("otto-aaaa", "", "rh", "ih", "otto", 1, False, Recipe("x", 64), (Picture("0.png", ""),), 0.0)
)


class Turns:
    """As much of Trainings as a sweep needs."""

    def __init__(self, log: TrainingLog) -> None:
        self.log = log

    async def in_turn(self, function: Callable[[], Awaitable[Any]]) -> Any:
        return await function()


@asynccontextmanager
async def kept(tmp_path: Path, seconds: float | None, now: float) -> AsyncIterator[tuple[Retention, Path]]:
    """A server's retention at `now`, over the data of `tmp_path`."""
    book = Book(tmp_path / "atelier.db")
    log = TrainingLog(book, tmp_path / "trainings")
    yield Retention(cast(Trainings, Turns(log)), seconds=seconds, clock=lambda: now), tmp_path / "trainings"
    book.close()


def fill(tmp_path: Path, *trainings: tuple[str, State, float | None]) -> None:
    book = Book(tmp_path / "atelier.db")
    for training, state, end_time in trainings:
        book.insert(replace(RECORD, id=training), Accepted("otto", 1, 0.0, 0))
        book.update(training, state=state, end_time=end_time)
        for name in ("images", "class", "samples"):
            folder = tmp_path / "trainings" / training / name
            folder.mkdir(parents=True)
            (folder / "0.png").write_bytes(b"picture")
    book.close()


async def test_pictures_go_when_their_time_has_come_and_samples_stay(tmp_path: Path) -> None:
    fill(
        tmp_path,
        ("otto-aaaa", State.SUCCEEDED, 10 * DAY),
        ("red/otto-bbbb", State.FAILED, 11 * DAY),
        ("otto-cccc", State.CANCELLED, 12 * DAY),
        ("otto-dddd", State.RUNNING, None),
        ("otto-eeee", State.PAUSED, 1 * DAY),
    )
    async with kept(tmp_path, 30 * DAY, 40 * DAY) as (retention, trainings):
        assert await retention.sweep() == ["otto-aaaa"]
        assert [p.name for p in (trainings / "otto-aaaa").iterdir()] == ["samples"]
        assert await retention.sweep() == []
    # A server that was away catches up.
    async with kept(tmp_path, 30 * DAY, 41.5 * DAY) as (retention, trainings):
        assert await retention.sweep() == ["red/otto-bbbb"]
        assert (trainings / "otto-cccc" / "images" / "0.png").is_file()
    async with kept(tmp_path, 0, 99 * DAY) as (retention, trainings):
        assert await retention.sweep() == ["otto-cccc"]
        assert (trainings / "otto-dddd" / "images" / "0.png").is_file()
        assert (trainings / "otto-eeee" / "images" / "0.png").is_file()


async def test_without_a_setting_everything_is_kept(tmp_path: Path) -> None:
    fill(tmp_path, ("otto-aaaa", State.SUCCEEDED, 0.0))
    async with kept(tmp_path, None, 10_000 * DAY) as (retention, trainings):
        assert await retention.sweep() == []
        await retention.keep_house()
        assert (trainings / "otto-aaaa" / "images" / "0.png").is_file()


async def test_what_is_not_in_the_book_is_removed_at_the_start(tmp_path: Path) -> None:
    fill(tmp_path, ("otto-aaaa", State.QUEUED, None), ("images/otto-bbbb", State.QUEUED, None))
    for orphan in ("otto-zzzz/images", "images/otto-zzzz/samples", "red/otto-zzzz/class"):
        (tmp_path / "trainings" / orphan).mkdir(parents=True)
    async with kept(tmp_path, None, 0) as (retention, trainings):
        await retention.remove_orphans()
        left = {p.parent.relative_to(trainings).as_posix() for p in trainings.rglob("0.png")}
        assert {part.rpartition("/")[0] for part in left} == {"otto-aaaa", "images/otto-bbbb"}
        assert not list(trainings.rglob("otto-zzzz"))


async def test_what_a_training_has_left_is_nobodys_orphan(tmp_path: Path) -> None:
    """Its pictures have gone and it painted no samples: only the full weights are there."""
    fill(tmp_path, ("otto-aaaa", State.SUCCEEDED, 0.0), ("red/otto-bbbb", State.SUCCEEDED, 0.0))
    for training in ("otto-aaaa", "red/otto-bbbb"):
        (tmp_path / "trainings" / training / "samples").rename(tmp_path / "trainings" / training / "bases")
    async with kept(tmp_path, 0.0, DAY) as (retention, trainings):
        await retention.sweep()
        await retention.remove_orphans()
        for training in ("otto-aaaa", "red/otto-bbbb"):
            assert [part.name for part in (trainings / training).iterdir()] == ["bases"]


@pytest.mark.parametrize("what", ["images", "class"])
async def test_a_removal_that_was_cut_short_goes_on(tmp_path: Path, what: str) -> None:
    fill(tmp_path, ("otto-aaaa", State.SUCCEEDED, 0.0))
    (tmp_path / "trainings" / "otto-aaaa" / what / "0.png").unlink()
    async with kept(tmp_path, 1.0, DAY) as (retention, trainings):
        assert await retention.sweep() == ["otto-aaaa"]
        assert [p.name for p in (trainings / "otto-aaaa").iterdir()] == ["samples"]
