"""Uploads: pictures move as a whole or not at all, nobody takes all the room, leftovers are bounded."""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from pathlib import Path

import pytest

from atelier_server.errors import Cancelled, TooManyUploads
from atelier_server.jobs.uploads import PictureUpload, Uploads


@pytest.fixture
def uploads(tmp_path: Path) -> Uploads:
    made = Uploads(tmp_path / "uploads", limit=2)
    made.sweep()
    return made


async def filled(uploads: Uploads) -> PictureUpload:
    upload = uploads.pictures()
    for data in (b"one", b"two", b"three"):
        await upload.add(data, "png", "")
    return upload


async def test_pictures_that_are_being_moved_are_not_discarded(
    uploads: Uploads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client goes while its training is written down: whoever comes first decides."""
    upload, target = await filled(uploads), tmp_path / "trainings" / "otto-1" / "images"
    entered, release = threading.Event(), threading.Event()
    rename = Path.rename

    def slow(self: Path, to: Path) -> Path:
        entered.set()
        assert release.wait(30)
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", slow)
    moving = asyncio.create_task(upload.move_to(target))
    assert await asyncio.to_thread(entered.wait, 30)
    await upload.discard()
    release.set()
    await moving
    assert sorted(path.read_bytes() for path in target.iterdir()) == [b"one", b"three", b"two"]


async def test_pictures_that_were_discarded_are_not_moved(uploads: Uploads, tmp_path: Path) -> None:
    upload = await filled(uploads)
    await upload.discard()
    await upload.discard()
    with pytest.raises(Cancelled):
        await upload.move_to(tmp_path / "images")
    assert not (tmp_path / "images").exists()


async def test_what_cannot_be_moved_is_discarded(uploads: Uploads, tmp_path: Path) -> None:
    upload = await filled(uploads)
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OSError, match="taken"):
        await upload.move_to(tmp_path / "taken" / "images")
    await upload.discard()
    assert not upload.folder.exists()


def test_a_full_house_is_full_for_those_who_are_in_it(uploads: Uploads) -> None:
    with uploads.turn("red"), uploads.turn("red"):
        with pytest.raises(TooManyUploads), uploads.turn("red"):
            pass
        with uploads.turn("blue"), pytest.raises(TooManyUploads), uploads.turn("blue"):
            pass
    with uploads.turn("red"), uploads.turn("blue"):
        pass


def test_interrupted_uploads_are_bounded_however_often_somebody_breaks_off(
    uploads: Uploads, tmp_path: Path
) -> None:
    for number in range(40):
        with suppress(asyncio.CancelledError), uploads.partial.claim("red", f"{number:064}", 9, 0) as path:
            path.write_bytes(b"half")
            raise asyncio.CancelledError
    assert 1 < len(list((tmp_path / "uploads-partial").iterdir())) <= 17


def test_the_second_sender_of_an_upload_leaves_nothing_that_nobody_goes_on_with(
    uploads: Uploads, tmp_path: Path
) -> None:
    with uploads.partial.claim("red", "0" * 64, 9, 0) as first:
        with suppress(asyncio.CancelledError), uploads.partial.claim("red", "0" * 64, 9, 0) as second:
            raise asyncio.CancelledError
        assert list((tmp_path / "uploads-partial").iterdir()) == [first]
    assert second != first
