"""The store as its readers see it: what references mean, what versions there are, files with their checksums.

Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from atelier_server.adapters import catalog
from atelier_server.adapters.blobs import Blobs
from atelier_server.adapters.catalog import ADAPTER_FILE, VERSION_TAG, Catalog, NameEntries
from atelier_server.adapters.objects import Objects
from atelier_server.adapters.records import AdapterVersion, CheckpointRecord
from atelier_server.adapters.staging import Staging
from atelier_server.core import SCOPED_NAME, AdapterRef, AdapterUse, CheckpointId
from atelier_server.errors import AdapterNotFound, DataLoss


class Shelf:
    """Reads a store. Everything raises StoreUnavailable where it cannot be reached."""

    def __init__(self, objects: Objects, staging: Staging, blobs: Blobs) -> None:
        self._objects = objects
        self._staging = staging
        self._blobs = blobs
        self._catalog = Catalog(objects, blobs)

    def resolve(self, ref: AdapterRef) -> AdapterUse:
        """What `find` finds, for use. Raises AdapterNotFound, DataLoss if it is known to be damaged."""
        record = self.find(ref)
        if record.damaged:
            raise _damaged(record.id)
        return AdapterUse(record.id, ref.weight, record.path, record.sha256)

    def find(self, ref: AdapterRef) -> CheckpointRecord:
        """The checkpoint that `ref` means now. Raises AdapterNotFound.

        No selector: the recommended one of the newest version that has a checkpoint; a step: that of the
        same version; `vN`: the recommended one of version N; `vN@STEP`: that of a step of it; a tag: what
        it was put on.
        """
        self._check(ref.name)
        entries = self._entries(ref.name)
        if ref.selector in entries.tags:
            target = self._catalog.value(entries.tags[ref.selector]).content
            version, step = target.get("version"), str(target.get("step"))
        else:
            tagged = VERSION_TAG.fullmatch(ref.selector)
            version, step = (int(tagged[1]), tagged[2] or "") if tagged else (None, ref.selector)
        versions = self._catalog.versions(ref.name, entries)
        record = self._choose(versions, version, step)
        if record is None:
            raise missing(ref.name, ref.selector if versions else "")
        return record

    def version(self, name: str, version: int | None = None) -> AdapterVersion:
        """Version `version`, or the newest that has a checkpoint. Raises AdapterNotFound."""
        self._check(name)
        for found in reversed(self._catalog.versions(name, self._entries(name))):
            if version == found.meta.version or (version is None and found.checkpoints):
                return found
        raise missing(name, f"v{version}" if version is not None else "")

    def versions_of(self, name: str) -> list[AdapterVersion]:
        """Every version of one adapter by number; none for a name that is none."""
        if not SCOPED_NAME.fullmatch(name):
            return []
        return self._catalog.versions(name, self._entries(name))

    def versions(self, tenant: str | None = None, *, deleted: bool = False) -> list[AdapterVersion]:
        """Every version by name, then number; also those without a checkpoint yet.

        Of all tenants, or of one ("" is the default tenant); `deleted`: those that wait in the trash instead.
        """
        listed = self._catalog.listed(f"names/@{tenant}" if tenant else "names")
        names = sorted(name for name in listed if tenant is None or name.rpartition("/")[0] == tenant)
        damaged = self._blobs.damaged()
        return [
            v for name in names for v in self._catalog.versions(name, listed[name], damaged, deleted=deleted)
        ]

    def last_checkpoint(self, name: str, version: int) -> CheckpointRecord | None:
        """The checkpoint with the highest step of that version, if there is one."""
        found = self.read_version(name, version)
        return found.checkpoints[-1] if found and found.checkpoints else None

    def published(self, checkpoint: CheckpointId) -> CheckpointRecord:
        """Raises AdapterNotFound."""
        found = self.read_version(checkpoint.name, checkpoint.version)
        records = {record.id: record for record in found.checkpoints} if found else {}
        if checkpoint not in records:
            raise version_gone(checkpoint)
        return records[checkpoint]

    def is_here(self, record: CheckpointRecord) -> bool:
        """Whether its weights can be read without a network."""
        return ADAPTER_FILE in record.files and self._blobs.is_here(record.files[ADAPTER_FILE])

    # -------------------------------------------------------------------------------------------- files
    def file(self, checkpoint: CheckpointId, name: str = ADAPTER_FILE) -> Path:
        """A file of a checkpoint on this machine, fetched where it is remote, its checksum verified.

        Raises AdapterNotFound, FileNotFoundError if the checkpoint has no such file, DataLoss (then what is
        rotten is in quarantine, and lists show the adapter as damaged).
        """
        record = self.published(checkpoint)
        if record.damaged and not record.files:
            raise _damaged(checkpoint)
        if name not in record.files:
            raise FileNotFoundError(name)
        file = record.files[name]
        return self._blobs.fetch(file.sha256, self._blobs.path(file), str(checkpoint))

    def fetch(self, use: AdapterUse) -> Path:
        """The weights of a use on this machine, verified, though its version may have been deleted since.

        Raises AdapterNotFound if they are gone for that reason, else DataLoss.
        """
        try:
            return self._blobs.fetch(use.sha256, Path(use.path), str(use.checkpoint))
        except DataLoss:
            self.published(use.checkpoint)
            raise

    def verify(self, record: CheckpointRecord) -> None:
        """Reads the weights and compares their digest. Raises DataLoss if they are missing or differ."""
        self.file(record.id)

    @contextmanager
    def checkout(self, checkpoint: CheckpointId) -> Iterator[Path]:
        """A folder with all files of a checkpoint under their names, for the block. Raises what `file`
        raises.
        """
        record = self.published(checkpoint)
        with self._staging.folder() as folder:
            for name in record.files:
                (folder / name).symlink_to(self.file(checkpoint, name).absolute())
            yield folder

    # ------------------------------------------------------------------------------------------ inside
    def _check(self, name: str) -> None:
        """No key is ever made of a string that is not an adapter's name."""
        if not SCOPED_NAME.fullmatch(name):
            raise missing(name, "")

    def _entries(self, name: str) -> NameEntries:
        return self._catalog.listed(catalog.folder(name)).get(name, NameEntries())

    def read_version(self, name: str, version: int) -> AdapterVersion | None:
        with suppress(AdapterNotFound):
            return self.version(name, version)
        return None

    @staticmethod
    def _choose(versions: list[AdapterVersion], version: int | None, step: str) -> CheckpointRecord | None:
        for found in reversed(versions):
            if version == found.meta.version or (version is None and found.checkpoints):
                if not step:
                    return found.recommended
                return next((r for r in found.checkpoints if str(r.id.step) == step), None)
        return None


def missing(name: str, selector: str) -> AdapterNotFound:
    full = f"{name[:80]}@{selector}" if selector else name[:80]
    return AdapterNotFound(f"there is no adapter {full!r}", name=full)


def version_gone(checkpoint: CheckpointId) -> AdapterNotFound:
    return missing(checkpoint.name, f"v{checkpoint.version}")


def _damaged(checkpoint: CheckpointId) -> DataLoss:
    return DataLoss(
        f"{checkpoint} is damaged: import it again to heal it, or delete it", {"adapter": str(checkpoint)}
    )
