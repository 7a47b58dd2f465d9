"""Uploads that were interrupted: what has come of them is kept for a while, so that they can go on."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atelier_server.errors import FailedPrecondition, InvalidRequest, Violation

KEEP_SECONDS = 6 * 3600.0
_MOST = 16


class PartialUploads:
    """Files named by whose they are and what they are to become; a server that comes back finds them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._busy: set[str] = set()

    def held(self, tenant: str, sha256: str, size_bytes: int) -> int:
        """How many bytes are here of that upload; 0 while somebody is sending it."""
        key = _key(tenant, sha256, size_bytes)
        return 0 if key in self._busy else _size(self._folder / key)

    @contextmanager
    def claim(self, tenant: str, sha256: str, size_bytes: int, offset: int) -> Iterator[Path]:
        """The file to go on with at `offset`, cut there; the caller removes or moves it if the upload ends.

        It stays where the block is cancelled, as it is when its client has gone. Raises InvalidRequest if
        fewer bytes are here, FailedPrecondition if somebody else is sending it.
        """
        key = _key(tenant, sha256, size_bytes)
        alone = key in self._busy  # nobody can go on with it: another call is sending the same
        if alone:
            if offset:
                raise FailedPrecondition("another call is sending this upload; begin at offset 0")
            key = f"{key}-{time.time_ns():x}"
        path = self._folder / key
        if offset > (held := _size(path)):
            raise InvalidRequest.of(
                [Violation("metadata.offset", f"{held} bytes are here; QueryUpload tells")]
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        self._busy.add(key)
        # Here, not only now and then: else whoever begins and breaks off often enough fills the disk.
        self.expire()
        try:
            with path.open("ab") as file:
                file.truncate(offset)
            yield path
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and not alone:
                raise
            path.unlink(missing_ok=True)
            raise
        finally:
            self._busy.discard(key)

    def expire(self, keep_seconds: float = KEEP_SECONDS) -> None:
        """Removes what nobody came back for, and the oldest of too many."""
        files = []
        for path in self._folder.glob("*"):
            with suppress(FileNotFoundError):
                files.append((path.stat().st_mtime, path))
        files.sort(reverse=True)
        for number, (changed, path) in enumerate(files):
            old = time.time() - changed > keep_seconds or number >= _MOST
            if old and path.name not in self._busy:
                path.unlink(missing_ok=True)


def _key(tenant: str, sha256: str, size_bytes: int) -> str:
    return hashlib.sha256(f"{tenant}/{sha256}/{size_bytes}".encode()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
