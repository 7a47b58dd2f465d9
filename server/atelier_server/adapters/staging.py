"""Folders that appear whole or not at all, whatever dies in between.

A folder is filled below `.staging`, flushed to the disk and renamed into its place. Whoever fills one holds
an flock on it; the lock dies with its holder, so `sweep` can tell a leftover from a folder in use, also from
another process.
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
_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)


class Staging:
    """The staging area of one store; `root` is the store's folder (one file system)."""

    def __init__(self, root: Path) -> None:
        self._area = root / ".staging"

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new empty folder, removed on the way out unless `place` has moved it.

        Raises StorageFull where the block fails for lack of space.
        """
        path, lock = self._locked_folder()
        try:
            yield path
        except OSError as error:
            if error.errno in _FULL:
                raise StorageFull("no space left in the adapter store") from error
            raise
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)

    def place(self, staged: Path, target: Path) -> bool:
        """Flushes `staged` and renames it to `target`; False if something is there already.

        Raises FileNotFoundError if the parent of `target` has gone.
        """
        for folder, _, files in os.walk(staged):
            for name in files:
                flush(Path(folder) / name)
            flush(Path(folder))
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno in _OCCUPIED:
                return False
            raise
        flush(target.parent)
        return True

    def discard(self, target: Path) -> bool:
        """Makes `target` disappear at once, then frees its space; False if it was not there."""
        self._area.mkdir(parents=True, exist_ok=True)
        doomed = self._area / uuid.uuid4().hex
        try:
            target.rename(doomed)
        except FileNotFoundError:
            return False
        with suppress(FileNotFoundError):
            flush(target.parent)
        shutil.rmtree(doomed, ignore_errors=True)
        return True

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
            try:
                path.mkdir(parents=True)
            except OSError as error:
                if error.errno in _FULL:
                    raise StorageFull("no space left in the adapter store") from error
                raise
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
