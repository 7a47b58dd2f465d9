"""The event log of trainings, live: write first, then publish; readers follow the log itself.

A reader holds nothing but the number of its last event, so a slow one costs no memory, loses nothing and
blocks nobody.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Any

from atelier_server.core import State, TrainingImage, TrainingJob
from atelier_server.errors import ServerDraining, TrainingNotFound, by_reason
from atelier_server.jobs.book import Book
from atelier_server.jobs.records import Completed, LoggedEvent, Payload, Sampled, TrainingRecord

_PAGE = 100
# What users sent, and what was painted of the class to go with it.
PICTURE_FOLDERS = ("images", "class")
_CLASS = PICTURE_FOLDERS[1]
_SAMPLES, _BASES = "samples", "bases"
_PARTS = (*PICTURE_FOLDERS, _SAMPLES, _BASES)
# A training's name within its tenant; none of its parts is called so.
_TRAINING = re.compile(r".+-[a-z0-9]{4}")


class TrainingLog:
    """Appends to the book, wakes the readers. `folder` holds one folder a training for its pictures."""

    def __init__(self, book: Book, folder: Path) -> None:
        self.book = book
        self._folder = folder
        self._bells: dict[str, asyncio.Event] = {}
        self._draining = False

    def folder(self, training: str) -> Path:
        return self._folder / training

    def folders(self) -> list[str]:
        """The trainings that have a folder; a tenant's lie in the tenant's."""
        found: list[str] = []
        for entry in _folders_in(self._folder):
            inside = _folders_in(entry)
            if any(part.name in _PARTS for part in inside):
                found.append(entry.name)
            else:
                found += [f"{entry.name}/{part.name}" for part in inside if _TRAINING.fullmatch(part.name)]
        return found

    def remove(self, training: str) -> None:
        """Removes a training's folder with all that is in it. Idempotent; OSError if some of it stays."""
        with suppress(FileNotFoundError):
            shutil.rmtree(self.folder(training))

    async def job(self, record: TrainingRecord, resume_step: int) -> TrainingJob:
        """A training for the worker, to go on from a checkpoint, with all that has been painted for it."""
        images = self.folder(record.id) / "images"
        sampled = await self.book.do(self.book.events_of, record.id, "sample")
        return TrainingJob(
            id=record.id,
            name=record.adapter,
            version=record.version,
            recipe=record.recipe,
            images=tuple(TrainingImage(str(images / p.file), p.caption) for p in record.images),
            resume_step=resume_step,
            sampled=frozenset(
                (e.payload.step, e.payload.index) for e in sampled if isinstance(e.payload, Sampled)
            ),
            class_images=await self.class_images(record.id),
            bases=str(self.bases_folder(record.id)),
        )

    def bases_folder(self, training: str) -> Path:
        """Where the worker keeps full weights, a folder a step."""
        return self.folder(training).resolve() / _BASES

    def bases(self, training: str) -> list[Path]:
        """Those that are there, by step."""
        found = self.bases_folder(training).glob("*/model_index.json")
        steps = [path.parent for path in found if path.parent.name.isdigit()]
        return sorted(steps, key=lambda path: int(path.name))

    async def append(self, training: str, payload: Payload, **changes: Any) -> None:
        """Writes the event and the changes of the training's record at once, then wakes its readers."""
        await self.book.do(self.book.append, training, payload, **changes)
        self.ring(training)

    def ring(self, training: str) -> None:
        """Makes the readers of a training look again."""
        if bell := self._bells.pop(training, None):
            bell.set()

    async def watch(self, training: str, after_seq: int) -> AsyncGenerator[LoggedEvent, None]:
        """Every event after `after_seq`, then those to come, until the training has ended.

        Raises what the training failed with; TrainingNotFound if it is unknown or has been deleted;
        ServerDraining when the server goes.
        """
        while True:
            # The bell is taken before the log is read: what is appended in between rings it.
            bell = self._bells.setdefault(training, asyncio.Event())
            events = await self.book.do(self.book.events, training, after_seq, _PAGE)
            for event in events:
                yield event
                after_seq = event.seq
            if events and not (len(events) < _PAGE and isinstance(events[-1].payload, Completed)):
                continue
            record = await self.book.do(self.book.training, training)
            if record is None:
                raise TrainingNotFound(f"there is no training {training!r}", name=training)
            if record.state.ended and record.last_seq <= after_seq:
                if record.state is State.FAILED:
                    raise by_reason(record.reason, record.message, dict(record.metadata))
                return
            if record.last_seq > after_seq:
                continue
            if self._draining:
                raise ServerDraining("the server is going away; the training goes on when it is back")
            await bell.wait()

    def drain(self) -> None:
        """Ends every reader once it has what is written."""
        self._draining = True
        for training in list(self._bells):
            self.ring(training)

    # ----------------------------------------------------------------------------------------- pictures
    async def keep_sample(self, training: str, step: int, index: int, mime_type: str, data: bytes) -> str:
        """Writes a sample picture; returns the name of its file."""
        name = f"{step:06d}-{index}.{mime_type.rpartition('/')[2]}"
        await asyncio.to_thread(_write, self.folder(training) / _SAMPLES / name, data)
        return name

    async def keep_class_image(self, training: str, number: int, mime_type: str, data: bytes) -> None:
        name = f"{number:06d}.{mime_type.rpartition('/')[2]}"
        await asyncio.to_thread(_write, self.folder(training) / _CLASS / name, data)

    async def class_images(self, training: str) -> tuple[tuple[int, str], ...]:
        """The class pictures that are there, by number."""

        def listed() -> tuple[tuple[int, str], ...]:
            folder = self.folder(training).resolve() / _CLASS
            files = sorted(folder.iterdir()) if folder.is_dir() else []
            return tuple((int(file.stem), str(file)) for file in files if file.suffix != ".part")

        return await asyncio.to_thread(listed)

    async def sample(self, training: str, payload: Sampled) -> bytes:
        """The bytes of a sample picture; empty if the file has gone."""
        return await asyncio.to_thread(_read, self.folder(training) / _SAMPLES / payload.file)


def _folders_in(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_bytes(data)
    temporary.rename(path)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
