"""Write-once objects by key, on a disk or in an object store: all that the adapter store asks of either.
Torch-free.

No object is ever changed. `create` is the one conditional write: of several that write a key at once exactly
one wins (a hard link on a disk, `If-None-Match: *` in an object store), and a reader sees an object whole or
not at all.
"""

from __future__ import annotations

import errno
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from atelier_server.adapters.staging import Staging, flush
from atelier_server.errors import StoreUnavailable

_CONFLICTS = 5  # tries of a conditional write that S3 answers with 409: another one is under way


class Objects(ABC):
    """Keys are relative paths with `/`. Everything raises StoreUnavailable where the store cannot be
    reached.
    """

    @abstractmethod
    def file(self, key: str) -> Path:
        """The object as a file of this machine. Only for a store that is one: NotImplementedError."""

    @abstractmethod
    def keys(self, prefix: str) -> dict[str, str]:
        """Every key below `prefix` (a folder), with a stamp that is another one if the object is another
        one.
        """

    @abstractmethod
    def read(self, keys: Iterable[str]) -> dict[str, bytes]:
        """The contents of those keys that exist."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Writes a new object; False if another one is there. The same content again counts as written."""

    @abstractmethod
    def put(self, source: Path, key: str) -> None:
        """Makes a flushed file an object. Nobody else writes that key."""

    @abstractmethod
    def get(self, key: str, target: Path) -> None:
        """Copies an object to a file. Raises FileNotFoundError."""

    @abstractmethod
    def move(self, key: str, target: str) -> None:
        """Raises FileNotFoundError."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Idempotent."""


class LocalObjects(Objects):
    """Files below a folder. New ones are written aside, flushed, and linked to their name."""

    def __init__(self, root: Path, staging: Staging) -> None:
        self._root = root
        self._staging = staging

    def file(self, key: str) -> Path:
        return self._root / key

    def keys(self, prefix: str) -> dict[str, str]:
        return dict(_walk(self._root, self._root / prefix))

    def read(self, keys: Iterable[str]) -> dict[str, bytes]:
        found = {}
        for key in keys:
            with suppress(FileNotFoundError, NotADirectoryError):
                found[key] = (self._root / key).read_bytes()
        return found

    def create(self, key: str, data: bytes) -> bool:
        with self._staging.folder() as staged:
            source = staged / "object"
            source.write_bytes(data)
            flush(source)
            try:
                self._link(source, self._root / key)
            except FileExistsError:
                return False
        return True

    def put(self, source: Path, key: str) -> None:
        flush(source)
        with self._staging.full_disk():
            self._link(source, self._root / key)

    def get(self, key: str, target: Path) -> None:
        with suppress(FileExistsError):
            target.hardlink_to(self._root / key)

    def move(self, key: str, target: str) -> None:
        destination = self._root / target
        destination.parent.mkdir(parents=True, exist_ok=True)
        (self._root / key).rename(destination)
        flush(destination.parent)

    def remove(self, key: str) -> None:
        path = self._root / key
        path.unlink(missing_ok=True)
        with suppress(OSError):  # the last file takes its empty folders with it
            for parent in path.parents:
                if parent == self._root:
                    break
                parent.rmdir()

    def _link(self, source: Path, target: Path) -> None:
        while True:
            target.parent.mkdir(parents=True, exist_ok=True)
            # Between the two lines somebody may have removed the folder with its last file.
            with suppress(FileNotFoundError):
                target.hardlink_to(source)
                break
            source.stat()
        flush(target.parent)


class RemoteObjects(Objects):
    """Objects below a URL that fsspec knows, such as `s3://BUCKET/PREFIX`."""

    def __init__(self, url: str) -> None:
        try:
            fs, self._base = fsspec.url_to_fs(url, use_listings_cache=False)
        except (ImportError, ValueError) as error:
            raise StoreUnavailable(f"the store {url}: {error}") from error
        self._fs: Any = fs
        self._url = url

    def file(self, key: str) -> Path:
        raise NotImplementedError(f"{key} is not a file of this machine")

    def check(self) -> None:
        """Raises StoreUnavailable unless the store can be written and knows conditional writes."""
        key = f"probe-{time.time_ns():016x}"
        try:
            if not self.create(key, b"1") or self.create(key, b"2"):
                raise StoreUnavailable(
                    f"the store {self._url} does not honour If-None-Match, so it cannot be shared"
                )
        finally:
            self.remove(key)

    def keys(self, prefix: str) -> dict[str, str]:
        with self._reached():
            found: dict[str, dict[str, Any]] = self._fs.find(f"{self._base}/{prefix}", detail=True)
        return {path.removeprefix(f"{self._base}/"): _stamp(info) for path, info in found.items()}

    def read(self, keys: Iterable[str]) -> dict[str, bytes]:
        paths = {f"{self._base}/{key}": key for key in keys}
        if not paths:
            return {}
        with self._reached():
            found: dict[str, bytes | Exception] = self._fs.cat(list(paths), on_error="return")
            contents = {}
            for path, content in found.items():
                if isinstance(content, bytes):
                    contents[paths[path]] = content
                elif not isinstance(content, FileNotFoundError):
                    raise content
        return contents

    def create(self, key: str, data: bytes) -> bool:
        for attempt in range(_CONFLICTS):
            try:
                with self._reached():
                    self._fs.pipe_file(f"{self._base}/{key}", data, mode="create")
                return True
            except FileExistsError:
                break
            except StoreUnavailable as error:
                conflict = "Conflict" in str(error) or getattr(error.__cause__, "errno", 0) == errno.EBUSY
                if not conflict or attempt == _CONFLICTS - 1:
                    raise
                time.sleep(0.05 * 2**attempt)
        # Our own first try may have been written while its answer was lost: then the object is ours.
        return self.read([key]).get(key) == data

    def put(self, source: Path, key: str) -> None:
        with self._reached():
            self._fs.put_file(str(source), f"{self._base}/{key}")

    def get(self, key: str, target: Path) -> None:
        with self._reached():
            self._fs.get_file(f"{self._base}/{key}", str(target))

    def move(self, key: str, target: str) -> None:
        with self._reached():
            self._fs.cp_file(f"{self._base}/{key}", f"{self._base}/{target}")
        self.remove(key)

    def remove(self, key: str) -> None:
        with self._reached(), suppress(FileNotFoundError):
            self._fs.rm_file(f"{self._base}/{key}")

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Every error of the libraries below becomes one of ours; a missing and an existing object stay as
        they are.
        """
        try:
            yield
        except (FileNotFoundError, FileExistsError) as error:
            if "bucket does not exist" in str(error):
                raise StoreUnavailable(f"the store {self._url}: {error}") from error
            raise
        except Exception as error:
            text = str(error) or type(error).__name__
            raise StoreUnavailable(f"the store {self._url} cannot be used now: {text[:300]}") from error


def _walk(root: Path, folder: Path) -> Iterator[tuple[str, str]]:
    for path, _, names in os.walk(folder):
        for name in names:
            file = Path(path) / name
            with suppress(FileNotFoundError):
                stat = file.stat()
                yield file.relative_to(root).as_posix(), f"{stat.st_size}-{stat.st_mtime_ns}-{stat.st_ino}"


def _stamp(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or (info.get("size"), info.get("created")))
