"""A cache of remote files on the disk, by content, bounded in size; processes share it. Torch-free."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path


class FileCache:
    """Files named by their SHA-256; the one used longest ago goes first when they exceed `most_bytes`."""

    def __init__(self, root: Path, most_bytes: int) -> None:
        self._root = root
        self._most_bytes = most_bytes

    def path(self, sha256: str) -> Path:
        """Where that file is, or would be."""
        return self._root / sha256[:2] / sha256

    def find(self, sha256: str) -> Path | None:
        """The file if it is here; counts as a use."""
        path = self.path(sha256)
        try:
            self._touch(path)
        except FileNotFoundError:
            return None
        return path

    def add(self, file: Path, sha256: str) -> Path:
        """Takes a file (of the same disk) in by a second name, and lets others go."""
        path = self.path(sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.hardlink_to(file)
        self._touch(path)
        self._shrink(path)
        return path

    def drop(self, sha256: str) -> None:
        self.path(sha256).unlink(missing_ok=True)

    @staticmethod
    def _touch(path: Path) -> None:
        """Only the time of its last use: the other one tells whether it has been changed."""
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))

    def _shrink(self, kept: Path) -> None:
        """A reader that has an evicted file open keeps it; one that has only its path fetches it again."""
        files = []
        for path in self._root.glob("??/*"):
            with suppress(FileNotFoundError):
                stat = path.stat()
                files.append((stat.st_atime_ns, stat.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._most_bytes:
                break
            if path != kept:
                path.unlink(missing_ok=True)
                total -= size
