"""Uploads on their way in: files under a temporary folder until the job they belong to is written down."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from atelier_server.errors import Cancelled, TooManyUploads
from atelier_server.jobs.partial_uploads import PartialUploads
from atelier_server.jobs.records import Picture

_COPY_BYTES = 2**22


class Uploads:
    """The temporary folder of a data directory."""

    def __init__(self, folder: Path, *, limit: int) -> None:
        self._folder = folder
        self.partial = PartialUploads(folder.with_name(f"{folder.name}-partial"))
        self._limit = limit
        self._under_way: Counter[str] = Counter()

    @contextmanager
    def turn(self, tenant: str) -> Iterator[None]:
        """For the length of a tenant's upload; one that has none under way may have one.

        Raises TooManyUploads.
        """
        if self._under_way.total() >= self._limit and self._under_way[tenant]:
            raise TooManyUploads(f"{self._limit} uploads are under way", {"limit": str(self._limit)})
        self._under_way[tenant] += 1
        try:
            yield
        finally:
            self._under_way[tenant] -= 1

    def sweep(self) -> None:
        """Removes what a former server left."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self.partial.expire()

    def pictures(self) -> PictureUpload:
        return PictureUpload(self._folder / uuid.uuid4().hex)

    def file(self) -> Path:
        """A name for a temporary file, which the caller removes."""
        return self._folder / f"{uuid.uuid4().hex}.safetensors"

    def unpack(self, path: Path, files: Sequence[tuple[str, int]]) -> Path:
        """A folder of the files (checked relative names, sizes) that lie one after another in `path`.

        The caller removes it.
        """
        folder = path.with_suffix("")
        with path.open("rb") as packed:
            for name, size in files:
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    left = size
                    while left and (data := packed.read(min(left, _COPY_BYTES))):
                        file.write(data)
                        left -= len(data)
        return folder


class PictureUpload:
    """The pictures of one training. Files are named by index and content, never by what the user says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pictures: tuple[Picture, ...] = ()
        self._digest = hashlib.sha256()
        self._numbers: dict[tuple[bytes, str], int] = {}
        # Whichever of `move_to` and `discard` comes first decides: the client may go while its training is
        # written down, and half of its pictures would be no training.
        self._moving = self._discarded = False

    @property
    def images_hash(self) -> str:
        """Covers contents, captions and order."""
        return self._digest.hexdigest()

    async def add(self, data: bytes, suffix: str, caption: str) -> int:
        """The number of the picture among those kept: an earlier one's for the same content and caption."""
        content = await asyncio.to_thread(hashlib.sha256, data)
        self._digest.update(content.digest())
        self._digest.update(hashlib.sha256(caption.encode()).digest())
        number = self._numbers.setdefault((content.digest(), caption), len(self.pictures))
        if number < len(self.pictures):
            return number
        name = f"{len(self.pictures):04d}-{content.hexdigest()[:16]}.{suffix}"
        await asyncio.to_thread(_write, self.folder / name, data)
        self.pictures = (*self.pictures, Picture(name, caption))
        return number

    async def move_to(self, target: Path) -> None:
        """Makes the pictures a training's own. Raises Cancelled if they have been discarded."""
        if self._discarded:
            raise Cancelled("the client has gone before its training was written down")
        self._moving = True
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            await asyncio.to_thread(self.folder.rename, target)
        except BaseException:
            self._moving = False
            await self.discard()
            raise

    async def discard(self) -> None:
        """Removes what is not being moved. Idempotent."""
        if self._moving:
            return
        self._discarded = True
        await asyncio.to_thread(shutil.rmtree, self.folder, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
