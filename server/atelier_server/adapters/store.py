"""The store of adapters: immutable versions and checkpoints below a folder or an object store's URL.
Torch-free.

Files lie in `blobs` by their content, small objects in `catalog` tell what they are for. Everything is
written once; a version or a checkpoint appears with one conditional write, its manifest, when its files are
there. The store is the only state: any number of servers may use one, and what a process remembers of it is
only what can never change. See `trash` for what is deleted, `labels` for tags and notes.
"""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from atelier_server.adapters import catalog
from atelier_server.adapters.blobs import Blobs, StoredFile
from atelier_server.adapters.cache import FileCache
from atelier_server.adapters.catalog import (
    ADAPTER_FILE,
)
from atelier_server.adapters.labels import Labels
from atelier_server.adapters.layout import migrate
from atelier_server.adapters.objects import LocalObjects, Objects, RemoteObjects
from atelier_server.adapters.records import TRAINING_STATE, AdapterVersion, CheckpointRecord, VersionMeta
from atelier_server.adapters.shelf import Shelf, version_gone
from atelier_server.adapters.staging import Staging
from atelier_server.adapters.trash import Trash
from atelier_server.core import SCOPED_NAME, CheckpointId
from atelier_server.errors import AdapterExists, InvalidRequest, Violation

__all__ = ["ADAPTER_FILE", "AdapterStore", "AdapterVersion", "CheckpointRecord", "VersionMeta"]

CACHE_BYTES = 20 * 2**30
GRACE_SECONDS = 24 * 3600.0
# In a manifest: its copies of a training's state are named by no other.
_OWN_STATE = "own_state"


class AdapterStore(Shelf):
    """The adapters at `location`: a folder, made when first needed, or a URL such as s3://BUCKET/PREFIX.

    Files of a remote store are kept in `cache`, at most `cache_bytes` of them. `owner` names this server in
    the versions that it makes. Files that nothing names are freed when they are older than `grace` seconds.
    """

    def __init__(
        self,
        location: Path | str,
        *,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        owner: str = "",
        grace: float = GRACE_SECONDS,
    ) -> None:
        objects, staging, files = _places(location, cache, cache_bytes)
        super().__init__(objects, staging, Blobs(objects, staging, files, grace))
        self.owner = owner
        self.labels = Labels(self._objects, self._catalog)
        self.trash = Trash(self._objects, self._catalog, self._blobs)

    @classmethod
    def at(cls, data_dir: Path, url: str, cache_bytes: int, owner: str) -> Self:
        """The store of a server: at `url`, or in its data directory."""
        location = url or data_dir / "adapters"
        return cls(location, cache=data_dir / "store-cache", cache_bytes=cache_bytes, owner=owner)

    @property
    def remote(self) -> bool:
        return isinstance(self._objects, RemoteObjects)

    def open(self) -> None:
        """Once, when a server starts: sweeps, brings an older layout into this one, tries a remote store.

        Raises StoreUnavailable.
        """
        self.sweep()
        if isinstance(self._objects, LocalObjects):
            migrate(self._objects, self._blobs)
        elif isinstance(self._objects, RemoteObjects):
            self._objects.check()

    def sweep(self) -> None:
        """Removes leftovers of interrupted publishes; publishes in progress, anywhere, are left alone."""
        self._staging.sweep()

    # ------------------------------------------------------------------------------------------ writing
    def create_version(
        self,
        *,
        name: str,
        trigger: str,
        base_model: str,
        base_sha256: str,
        training: str,
        new_version: bool,
        family: str = "",
        recipe: Mapping[str, Any] | None = None,
    ) -> VersionMeta:
        """The adapter's first version, or its next one if `new_version`; numbers are never used twice.

        Raises AdapterExists if the name is taken and `new_version` is not set, InvalidRequest for a name
        that is none, StorageFull, StoreUnavailable.
        """
        if not SCOPED_NAME.fullmatch(name):
            raise InvalidRequest.of([Violation("name", f"does not match {SCOPED_NAME.pattern}")])
        meta = VersionMeta(
            name, 0, trigger, base_model, base_sha256, training, time.time(), self.owner, family, recipe or {}
        )
        return self._claim(meta, new_version, None)

    def publish_version(
        self,
        write: Callable[[Path], None],
        *,
        name: str,
        trigger: str,
        base_model: str,
        base_sha256: str,
        new_version: bool,
        rank: int,
        lora_alpha: float,
        family: str = "",
    ) -> CheckpointRecord:
        """A whole version with one checkpoint, step 0, at once: what is imported or made of other adapters.

        Of two that take one name at once, one gets it. Content that is damaged under that name is healed
        instead. Raises what `create_version` and `publish` raise.
        """
        if not SCOPED_NAME.fullmatch(name):
            raise InvalidRequest.of([Violation("name", f"does not match {SCOPED_NAME.pattern}")])
        meta = VersionMeta(name, 0, trigger, base_model, base_sha256, "", time.time(), self.owner, family)
        damaged = [
            r for v in self._catalog.versions(name, self._entries(name)) for r in v.checkpoints if r.damaged
        ]
        with self._written(write) as files:
            for record in damaged:  # the same content once more: it is healed now
                if record.sha256 == files[ADAPTER_FILE].sha256 and not new_version:
                    return self.published(record.id)
            manifest = _manifest(files, loss=None, rank=rank, lora_alpha=lora_alpha)
            meta = self._claim(meta, new_version, manifest)
        return self.published(CheckpointId(name, meta.version, 0))

    def publish(
        self,
        checkpoint: CheckpointId,
        write: Callable[[Path], None],
        *,
        loss: float | None,
        rank: int,
        lora_alpha: float,
        validation_loss: float | None = None,
        kept_share: float | None = None,
    ) -> CheckpointRecord:
        """Publishes what `write` puts into the folder it is given: adapter.safetensors and anything else.

        All or nothing: until the manifest at the end nothing is visible. A step that is published already
        stays as it is: its record is returned if the weights are the same, AdapterExists is raised if not.
        Raises AdapterNotFound if the version was not created or has been deleted, StorageFull,
        StoreUnavailable, and whatever `write` raises.
        """
        if loss is not None and not math.isfinite(loss):
            raise ValueError(f"a checkpoint with loss {loss} must not be published")
        if self.read_version(checkpoint.name, checkpoint.version) is None:
            raise version_gone(checkpoint)
        with self._written(write) as files:
            manifest = _manifest(files, loss=loss, rank=rank, lora_alpha=lora_alpha)
            facts: dict[str, Any] = {"validation_loss": validation_loss, "kept_share": kept_share}
            manifest |= {name: value for name, value in facts.items() if value is not None}
            manifest[_OWN_STATE] = True
            if self.read_version(checkpoint.name, checkpoint.version) is None:
                raise version_gone(checkpoint)
            folder = f"{catalog.folder(checkpoint.name)}/v{checkpoint.version}"
            self._objects.create(f"{folder}/{checkpoint.step:06d}.json", _json(manifest))
        record = self.published(checkpoint)
        if record.sha256 != files[ADAPTER_FILE].sha256:
            raise AdapterExists(
                f"checkpoint {checkpoint} is published with other weights", name=checkpoint.name
            )
        return record

    def discard(self, name: str, version: int) -> None:
        """Takes back a version that has nothing in it. Idempotent."""
        found = self.read_version(name, version)
        if found is not None and not found.checkpoints:
            self._objects.remove(f"{catalog.folder(name)}/v{version}/version.json")

    def remove_checkpoint(self, checkpoint: CheckpointId) -> None:
        """Takes one checkpoint of a version away for good; its weights are freed by collection, when nothing
        names them and they are old. Raises ValueError for the last one of its version.
        """
        self.forget_state(checkpoint)
        folder = f"{catalog.folder(checkpoint.name)}/v{checkpoint.version}"
        self._objects.remove(f"{folder}/{checkpoint.step:06d}.json")

    def forget_state(self, checkpoint: CheckpointId) -> None:
        """Frees at once what only a training needs of a checkpoint, to go on from it. Idempotent.

        Raises ValueError for the last one of its version: a training goes on from that.
        """
        found = self.read_version(checkpoint.name, checkpoint.version)
        if found is None or found.recommended is None or found.recommended.id.step <= checkpoint.step:
            raise ValueError(f"{checkpoint} is the last of its version, or there is none")
        version = self._entries(checkpoint.name).versions[checkpoint.version]
        manifest = self._catalog.manifest(version, checkpoint.step) or {}
        if manifest.get(_OWN_STATE):
            for name, file in catalog.stored_files(manifest).items():
                if name.startswith(TRAINING_STATE):
                    self._blobs.remove(file)

    def delete(self, name: str, version: int | None = None) -> None:
        """Hides one version, or the whole adapter, until it is undeleted or collected. Raises
        AdapterNotFound.
        """
        self._check(name)
        self.trash.delete(name, version)

    @contextmanager
    def _written(self, write: Callable[[Path], None]) -> Iterator[dict[str, StoredFile]]:
        """The files of `write`, stored, and young enough to be named by a manifest that the block creates."""
        with self._staging.folder() as staged:
            write(staged)
            while True:
                files, until = self._blobs.put_folder(staged, own=TRAINING_STATE)
                if time.time() < until:
                    break
            yield files

    def _claim(
        self, meta: VersionMeta, new_version: bool, checkpoint: Mapping[str, Any] | None
    ) -> VersionMeta:
        """Writes version.json under the next free number."""
        folder = catalog.folder(meta.name)
        while True:
            entries = self._entries(meta.name)
            taken = any(v.checkpoints for v in self._catalog.versions(meta.name, entries))
            if not new_version and (
                taken or (checkpoint is None and self._catalog.versions(meta.name, entries))
            ):
                raise AdapterExists(f"adapter {meta.name!r} exists; set new_version to go on", name=meta.name)
            number = max(entries.versions, default=0) + 1
            content = {**asdict(meta), "version": number, "id": uuid.uuid4().hex}
            if checkpoint is not None:
                content["checkpoint"] = checkpoint
            # Another server may have taken the number meanwhile: look again.
            if self._objects.create(f"{folder}/v{number}/version.json", _json(content)):
                return VersionMeta(**{**asdict(meta), "version": number})


def _places(
    location: Path | str, cache: Path | None, cache_bytes: int
) -> tuple[Objects, Staging, FileCache | None]:
    """Where the objects are, where files are written before, and where remote ones are kept."""
    url = str(location)
    if "://" not in url or url.startswith("file://"):
        root = Path(url.removeprefix("file://"))
        staging = Staging(root)
        return LocalObjects(root, staging), staging, None
    if cache is None:
        raise ValueError("a remote store needs a folder for its cache")
    return RemoteObjects(url), Staging(cache), FileCache(cache, cache_bytes)


def _manifest(
    files: Mapping[str, StoredFile], *, loss: float | None, rank: int, lora_alpha: float
) -> dict[str, Any]:
    if ADAPTER_FILE not in files:
        raise FileNotFoundError(f"nothing was written to {ADAPTER_FILE}")
    return {
        "id": uuid.uuid4().hex,
        "files": {name: asdict(file) for name, file in files.items()},
        "create_time": time.time(),
        "loss": loss,
        "rank": rank,
        "lora_alpha": lora_alpha,
    }


def _json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False).encode()
