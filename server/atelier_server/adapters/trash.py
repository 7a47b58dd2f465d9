"""What has been deleted: hidden at once, back on request, removed for good after a while. Torch-free."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from atelier_server.adapters import catalog
from atelier_server.adapters.blobs import Blobs, StoredFile
from atelier_server.adapters.catalog import Catalog, NameEntries, Value, VersionEntries
from atelier_server.adapters.labels import set_register
from atelier_server.adapters.objects import Objects
from atelier_server.adapters.records import TRAINING_STATE
from atelier_server.errors import AdapterNotFound

_RACES = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Collected:
    """What a collection removed."""

    versions: tuple[tuple[str, int], ...]
    files: int


def _idle(_name: str, _version: int) -> bool:
    return False


class Trash:
    """Deletes versions. Their numbers stay taken for ever: what is resident somewhere is never mistaken."""

    def __init__(self, objects: Objects, catalog: Catalog, blobs: Blobs) -> None:
        self._objects = objects
        self._catalog = catalog
        self._blobs = blobs

    def delete(self, name: str, version: int | None) -> None:
        """Hides one version, or all. Raises AdapterNotFound."""
        if not self._turn(name, version, deleted=True):
            raise _missing(name, version, "there is no adapter")

    def undelete(self, name: str, version: int | None) -> None:
        """Brings back what has not been removed for good. Raises AdapterNotFound."""
        if not self._turn(name, version, deleted=False):
            raise _missing(name, version, "there is nothing to bring back of")

    def collect(self, retention: float, busy: Callable[[str, int], bool] = _idle) -> Collected:
        """Removes versions that were deleted `retention` seconds ago and are not `busy`, and files nobody
        names.
        """
        copies = self._blobs.listing()  # before the manifests: see Blobs
        listed = self._catalog.listed()
        purged = []
        named: list[StoredFile] = []
        readable = True
        for name, entries in listed.items():
            for number, version in entries.versions.items():
                state = self._catalog.value(version.registers.get("deleted"))
                old = (
                    state.content.get("time") is not None and time.time() - state.content["time"] >= retention
                )
                if old and not state.content.get("purged") and not busy(name, number):
                    gone = {**_state(time.time()), "purged": True}
                    if set_register(self._objects, _register(name, number), state, gone):
                        purged.append((name, number))
                        self._remove(version)
                        continue
                elif state.content.get("purged"):
                    self._remove(version)
                    continue
                try:
                    named += self._files(version)
                except (KeyError, TypeError, ValueError) as error:
                    readable = False
                    _log.warning(
                        "a manifest of %s@v%d cannot be read (%s): no file is freed", name, number, error
                    )
        return Collected(tuple(purged), self._blobs.free(copies, named) if readable else 0)

    def _files(self, version: VersionEntries) -> Iterator[StoredFile]:
        """What is kept of a version: a training goes on from its newest checkpoint, never from others."""
        steps = self._catalog.steps(version)
        for step in steps:
            files = catalog.stored_files(self._catalog.manifest(version, step) or {})
            newest = step == steps[-1]
            yield from (f for name, f in files.items() if newest or not name.startswith(TRAINING_STATE))

    def _remove(self, version: VersionEntries) -> None:
        """All but the register that says that it is gone; version.json last, for a collection that is cut
        short.
        """
        pictures = version.registers.get("thumbnail", {}).values()
        notes = version.registers.get("note", {}).values()
        for key in (*version.checkpoints.values(), *pictures, *notes, version.meta):
            if key:
                self._objects.remove(key)

    def _turn(self, name: str, version: int | None, *, deleted: bool) -> bool:
        """Whether there was a version to turn."""
        turned = False
        for _ in range(_RACES):
            entries = self._catalog.listed(catalog.folder(name)).get(name, NameEntries())
            left = [
                (number, state)
                for number, state in self._states(entries)
                if version in (None, number) and (state.content.get("time") is None) is deleted
            ]
            if not left:
                break
            for number, state in left:
                content = _state(time.time() if deleted else None)
                turned |= set_register(self._objects, _register(name, number), state, content)
        return turned

    def _states(self, entries: NameEntries) -> Iterator[tuple[int, Value]]:
        for number, version in entries.versions.items():
            state = self._catalog.value(version.registers.get("deleted"))
            if version.meta and not state.content.get("purged"):
                yield number, state


def _register(name: str, version: int) -> str:
    return f"{catalog.folder(name)}/v{version}/deleted"


def _state(deleted_at: float | None) -> dict[str, object]:
    return {"time": deleted_at}


def _missing(name: str, version: int | None, what: str) -> AdapterNotFound:
    full = f"{name}@v{version}" if version is not None else name
    return AdapterNotFound(f"{what} {full!r}", name=full)
