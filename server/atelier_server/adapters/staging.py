"""Folders in which files are written before they are published, whatever dies in between.

Whoever fills one holds an flock on it; the lock dies with its holder, so `sweep` can tell a leftover from a
folder in use, also from another process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atelier_server.errors import StorageFull

_FULL = (errno.ENOSPC, errno.EDQUOT)


class Staging:
    """The staging area of one store, below `root`."""

    def __init__(self, root: Path) -> None:
        self._area = root / ".staging"

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new empty folder, removed on the way out.

        Raises StorageFull where the block fails for lack of space.
        """
        path, lock = self._locked_folder()
        try:
            with self.full_disk():
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    @contextmanager
    def full_disk(self) -> Iterator[None]:
        """A full disk is StorageFull."""
        try:
            yield
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFull("no space left in the adapter store") from error
            raise

    def sweep(self) -> None:
        """Removes what dead processes left."""
        if not self._area.is_dir():
            return
        for path in sorted(self._area.iterdir()):
            with suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDONLY)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # somebody alive is filling it
                else:
                    shutil.rmtree(path, ignore_errors=True)
                finally:
                    os.close(lock)

    def _locked_folder(self) -> tuple[Path, int]:
        """A new folder and the descriptor that holds its lock."""
        while True:
            path = self._area / uuid.uuid4().hex
            with self.full_disk():
                path.mkdir(parents=True)
            # A sweep may come between mkdir and the lock: then the folder is gone, and we take another.
            with suppress(FileNotFoundError):
                lock = os.open(path, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_EX)
                if path.exists():
                    return path, lock
                os.close(lock)


def flush(path: Path) -> None:
    """fsync of a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
