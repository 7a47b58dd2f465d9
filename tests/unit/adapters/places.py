"""Where a store can be, for tests that hold for every place; and what they put into it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from atelier_server.adapters.records import CheckpointRecord, VersionMeta
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import CheckpointId


@dataclass(frozen=True, slots=True)
class Place:
    """A store's location; `open` gives one more handle on it, as another process or server has."""

    location: Path | str
    scratch: Path

    def open(self, name: str = "one", *, grace: float = 86400.0, cache_bytes: int = 2**30) -> AdapterStore:
        cache = self.scratch / f"cache-{name}"
        return AdapterStore(self.location, cache=cache, owner=name, grace=grace, cache_bytes=cache_bytes)

    @property
    def remote(self) -> bool:
        return isinstance(self.location, str)


def create(store: AdapterStore, name: str = "otto", *, new_version: bool = False) -> VersionMeta:
    return store.create_version(
        name=name,
        trigger="a sks octopus",
        base_model="pocket",
        base_sha256="00ff",
        training=f"{name}-1",
        new_version=new_version,
        recipe={"rank": 8},
    )


def publish(
    store: AdapterStore, step: int, *, version: int = 1, content: bytes = b"weights", name: str = "otto"
) -> CheckpointRecord:
    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(content)
        (folder / "training-state.json").write_text("{}")

    return store.publish(CheckpointId(name, version, step), write, loss=0.25, rank=8, lora_alpha=4.0)


def adopt(
    store: AdapterStore, name: str = "otto", content: bytes = b"weights", *, new_version: bool = False
) -> CheckpointRecord:
    """What an import does."""

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(content)

    return store.publish_version(
        write,
        name=name,
        trigger="",
        base_model="pocket",
        base_sha256="00ff",
        new_version=new_version,
        rank=4,
        lora_alpha=4.0,
    )


def keys(store: AdapterStore, prefix: str = "") -> set[str]:
    """Every object of a store, and every file of its staging area."""
    return set(store._objects.keys(prefix))


def rot(store: AdapterStore, content: bytes, sha256: str) -> None:
    """Puts `content` where the stored file with that digest is, and where it is cached."""
    for key in keys(store, "blobs"):
        if sha256 in key:
            store._objects.remove(key)
            with store._staging.folder() as folder:
                (folder / "x").write_bytes(content)
                store._objects.put(folder / "x", key)
    if store._blobs._cache is not None:
        store._blobs._cache.drop(sha256)


def lose(store: AdapterStore, sha256: str) -> None:
    """Removes a stored file behind the store's back."""
    for key in keys(store, "blobs"):
        if sha256 in key:
            store._objects.remove(key)
    if store._blobs._cache is not None:
        store._blobs._cache.drop(sha256)
