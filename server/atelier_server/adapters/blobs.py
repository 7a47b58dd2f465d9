"""The files of adapters by their content: stored once, verified when read, quarantined when rotten.
Torch-free.

    blobs/ab/SHA256-TIME          the content; TIME (nanoseconds, hex) is when this copy was begun
    quarantine/SHA256-TIME        a copy that did not match its name; SHA256-missing if there was none at all

A file that nobody names is freed once it is older than `grace` seconds; a manifest may only name copies
younger than that, and an older one is stored anew under another TIME. So whoever frees, even a server that
has slept for an hour between looking and removing, never takes what somebody else is publishing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from atelier_server.adapters.cache import FileCache
from atelier_server.adapters.objects import Objects
from atelier_server.adapters.staging import Staging
from atelier_server.errors import DataLoss

_TRIES = 2  # before a copy is called rotten: the first reading may have gone wrong on its way


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as a manifest names it: its content, and the copy that was there when it was published."""

    sha256: str
    size_bytes: int
    blob: str


class Blobs:
    """`cache` is None where the objects themselves are files of this machine."""

    def __init__(self, objects: Objects, staging: Staging, cache: FileCache | None, grace: float) -> None:
        self._objects = objects
        self._staging = staging
        self._cache = cache
        self._grace = grace
        self._verified: dict[Path, tuple[int, int, int]] = {}

    # ------------------------------------------------------------------------------------------ writing
    def put_folder(self, folder: Path, own: str = "") -> tuple[dict[str, StoredFile], float]:
        """Every file of a staging folder by its name, and until when (seconds since the epoch) they may be
        named. Those whose name begins with `own` share their copy with nobody: see `remove`.

        What is stored is healed: a quarantined copy of the same content is forgotten.
        """
        files = {
            path.name: self._put(path, shared=not own or not path.name.startswith(own))
            for path in sorted(folder.iterdir())
            if path.is_file()
        }
        begun = min((_time(file.blob) for file in files.values()), default=time.time())
        self._heal(*(file.sha256 for file in files.values()))
        return files, begun + 0.75 * self._grace

    def remove(self, file: StoredFile) -> None:
        """At once. Only for a copy that was nobody's else from the start. Idempotent."""
        self._objects.remove(f"blobs/{file.blob}")
        if self._cache is not None:
            self._cache.drop(file.sha256)

    def _put(self, source: Path, *, shared: bool) -> StoredFile:
        sha256, size = digest(source), source.stat().st_size
        copies = self._copies(sha256) if shared else []
        young = [key for key in copies if time.time() - _time(key) < 0.5 * self._grace]
        if young:
            return StoredFile(sha256, size, young[0].removeprefix("blobs/"))
        blob = f"{sha256[:2]}/{sha256}-{time.time_ns():016x}"
        self._objects.put(source, f"blobs/{blob}")
        if self._cache is not None:
            self._cache.add(source, sha256)
        return StoredFile(sha256, size, blob)

    # ------------------------------------------------------------------------------------------ reading
    def path(self, file: StoredFile) -> Path:
        """Where the file is on this machine, or will be once it is fetched. Looks at nothing."""
        if self._cache is not None:
            return self._cache.path(file.sha256)
        return self._objects.file(f"blobs/{file.blob}")

    def is_here(self, file: StoredFile) -> bool:
        """Whether it can be read without a network."""
        return self.path(file).exists()

    def fetch(self, sha256: str, path: Path, of: str) -> Path:
        """A file on this machine, verified; `path` is where it should be.

        Raises DataLoss that names `of` if there is no intact copy; what is rotten is in quarantine then.
        """
        expected = self._cache.find(sha256) if self._cache else path
        if expected is not None and self._intact(expected, sha256):
            if self._cache is None:
                self._heal(sha256)
            return expected
        if self._cache is not None:
            self._cache.drop(sha256)
        for key in self._copies(sha256):
            found = self._fetch(key, sha256)
            if found is not None:
                self._heal(sha256)
                return found
            with suppress(FileNotFoundError):
                self._objects.move(key, f"quarantine/{Path(key).name}")
        if sha256 not in self.damaged():
            self._objects.create(f"quarantine/{sha256}-missing", b"")
        text = f"{of}: a stored file is damaged or missing; import it again to heal it, or delete it"
        raise DataLoss(text, {"adapter": of})

    def _fetch(self, key: str, sha256: str) -> Path | None:
        """One copy, on this machine; None if it is rotten or gone."""
        for _ in range(_TRIES):
            if self._cache is None:
                if self._intact(path := self._objects.file(key), sha256):
                    return path
                continue
            with self._staging.folder() as staged, suppress(FileNotFoundError):
                self._objects.get(key, staged / "blob")
                if digest(staged / "blob") == sha256:
                    return self._cache.add(staged / "blob", sha256)
        return None

    def _intact(self, path: Path, sha256: str) -> bool:
        """Whether a file is what its name says; one that has not changed since is not read again."""
        try:
            stat = path.stat()
            seen = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
            if self._verified.get(path) != seen:
                if digest(path) != sha256:
                    return False
                self._verified[path] = seen
        except OSError:
            return False
        return True

    def damaged(self) -> frozenset[str]:
        """The contents that have something in quarantine."""
        return frozenset(_sha256(key) for key in self._objects.keys("quarantine"))

    def _heal(self, *contents: str) -> None:
        for key in self._objects.keys("quarantine"):
            if _sha256(key) in contents:
                self._objects.remove(key)

    # ------------------------------------------------------------------------------------------ freeing
    def listing(self) -> tuple[float, tuple[str, ...]]:
        """When it was, and every copy there was. Take it before the manifests are read: see `free`."""
        return time.time(), tuple(self._objects.keys("blobs"))

    def free(self, listing: tuple[float, tuple[str, ...]], named: Iterable[StoredFile]) -> int:
        """Removes the old copies of a listing that no manifest of later names; how many those were."""
        then, keys = listing
        blobs = {f"blobs/{file.blob}" for file in named}
        contents = {_sha256(blob) for blob in blobs}
        newest = {_sha256(key): key for key in sorted(keys, key=_time)}
        doomed = [
            key
            for key in keys
            if then - _time(key) > self._grace
            and key not in blobs
            and not (_sha256(key) in contents and newest[_sha256(key)] == key)
        ]
        for key in doomed:
            self._objects.remove(key)
        for key in self._objects.keys("quarantine"):
            if _sha256(key) not in contents:
                self._objects.remove(key)
        return len(doomed)

    def _copies(self, sha256: str) -> list[str]:
        """The keys of one content, the newest first."""
        keys = self._objects.keys(f"blobs/{sha256[:2]}")
        return sorted((key for key in keys if _sha256(key) == sha256), key=_time, reverse=True)


def digest(path: Path) -> str:
    """Lower-case hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(key: str) -> str:
    return key.rpartition("/")[2].partition("-")[0]


def _time(key: str) -> float:
    """When a copy was begun, in seconds since the epoch; a foreign file is as old as can be."""
    try:
        return int(key.rpartition("-")[2], 16) / 1e9
    except ValueError:
        return 0.0
