"""The store of adapters on disk: immutable checkpoints, each one folder with a manifest. Torch-free.

    ROOT/NAME/v1/version.json                   what the version was made for (`VersionMeta`)
    ROOT/NAME/v1/000750/adapter.safetensors     the weights of step 750, and whatever else `publish` wrote
    ROOT/NAME/v1/000750/manifest.json           digest, size, loss, rank, alpha, time
    ROOT/.staging/                              folders being written; see `staging`

The disk is the only state: any number of processes may use one root. Folders appear by one rename, so a
reader sees a version or a checkpoint whole or not at all. Listing reads the small json files only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from atelier_server.adapters.staging import Staging
from atelier_server.core import ADAPTER_NAME, AdapterRef, AdapterUse, CheckpointId
from atelier_server.errors import AdapterExists, AdapterNotFound, DataLoss, InvalidRequest, Violation

ADAPTER_FILE = "adapter.safetensors"
_VERSION = re.compile(r"v([1-9][0-9]*)")
_STEP = re.compile(r"[0-9]{6,}")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class VersionMeta:
    """One version of an adapter. `training` is the id of the training that made it, "" for an import."""

    name: str
    version: int
    trigger: str
    base_model: str
    base_sha256: str
    training: str
    create_time: float


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One published checkpoint. `path` is its safetensors file; size and digest are that file's.

    `loss` is the mean training loss since the checkpoint before, None for an import; times are in
    seconds since the epoch.
    """

    id: CheckpointId
    path: str
    sha256: str
    size_bytes: int
    create_time: float
    loss: float | None
    rank: int
    lora_alpha: float


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A version with its checkpoints by step."""

    meta: VersionMeta
    checkpoints: tuple[CheckpointRecord, ...]

    @property
    def recommended(self) -> CheckpointRecord | None:
        """What NAME without a step means: the last, as only finite losses are published."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def tags(self) -> tuple[str, ...]:
        return (f"v{self.meta.version}",)


class AdapterStore:
    """The adapters below `root`, which is made when first needed."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._staging = Staging(root)

    # ------------------------------------------------------------------------------------------ writing
    def create_version(
        self, *, name: str, trigger: str, base_model: str, base_sha256: str, training: str, new_version: bool
    ) -> VersionMeta:
        """The adapter's first version, or its next one if `new_version`; versions count from 1.

        Raises AdapterExists if the name is taken and `new_version` is not set, InvalidRequest for a name
        that is none, StorageFull.
        """
        if not ADAPTER_NAME.fullmatch(name):
            raise InvalidRequest.of([Violation("name", f"does not match {ADAPTER_NAME.pattern}")])
        while True:
            number = max(self._version_numbers(name), default=0) + 1
            if number > 1 and not new_version:
                raise AdapterExists(f"adapter {name!r} exists; set new_version to go on from it", name=name)
            meta = VersionMeta(name, number, trigger, base_model, base_sha256, training, time.time())
            with self._staging.folder() as staged:
                (self._root / name).mkdir(exist_ok=True)
                _write_json(staged / "version.json", asdict(meta))
                # Another process may have taken the number, or deleted the adapter: look again.
                with suppress(FileNotFoundError):
                    if self._staging.place(staged, self._root / name / f"v{number}"):
                        return meta

    def publish(
        self,
        checkpoint: CheckpointId,
        write: Callable[[Path], None],
        *,
        loss: float | None,
        rank: int,
        lora_alpha: float,
    ) -> CheckpointRecord:
        """Publishes what `write` puts into the folder it is given: adapter.safetensors and anything else.

        All or nothing: until the rename at the end nothing is visible. A step that is published already
        stays as it is: its record is returned if the weights are the same, AdapterExists is raised if not.
        Raises AdapterNotFound if the version was not created or has been deleted, StorageFull, and
        whatever `write` raises.
        """
        if loss is not None and not math.isfinite(loss):
            raise ValueError(f"a checkpoint with loss {loss} must not be published")
        target = self.folder(checkpoint)
        if not (target.parent / "version.json").exists():
            raise _version_gone(checkpoint)
        with self._staging.folder() as staged:
            write(staged)
            weights = staged / ADAPTER_FILE
            manifest = {
                "sha256": _sha256(weights),
                "size_bytes": weights.stat().st_size,
                "create_time": time.time(),
                "loss": loss,
                "rank": rank,
                "lora_alpha": lora_alpha,
            }
            _write_json(staged / "manifest.json", manifest)
            try:
                placed = self._staging.place(staged, target)
            except FileNotFoundError:
                raise _version_gone(checkpoint) from None
        record = self._record(checkpoint)
        if record is None:
            raise _version_gone(checkpoint)
        if not placed and record.sha256 != manifest["sha256"]:
            raise AdapterExists(
                f"checkpoint {checkpoint} is published with other weights", name=checkpoint.name
            )
        return record

    def delete(self, name: str, version: int | None = None) -> None:
        """Deletes one version, or the whole adapter. Raises AdapterNotFound."""
        self._check(name)
        target = self._root / name if version is None else self._root / name / f"v{version}"
        if not self._staging.discard(target):
            raise _missing(name, f"v{version}" if version is not None else "")
        with suppress(OSError):  # the last version takes the empty folder with it
            (self._root / name).rmdir()

    def sweep(self) -> None:
        """Removes leftovers of interrupted publishes; publishes in progress, anywhere, are left alone."""
        self._staging.sweep()

    # ------------------------------------------------------------------------------------------ reading
    def resolve(self, ref: AdapterRef) -> AdapterUse:
        """The checkpoint that `ref` means now. Raises AdapterNotFound.

        No selector: the recommended one of the newest version that has a checkpoint; a step: that of the
        same version; `vN`: the recommended one of version N.
        """
        tagged = _VERSION.fullmatch(ref.selector)
        found = self.version(ref.name, int(tagged[1]) if tagged else None)
        if ref.selector and not tagged:
            records = [r for r in found.checkpoints if str(r.id.step) == ref.selector]
            record = records[0] if records else None
        else:
            record = found.recommended
        if record is None:
            raise _missing(ref.name, ref.selector)
        return AdapterUse(record.id, ref.weight, record.path, record.sha256)

    def version(self, name: str, version: int | None = None) -> AdapterVersion:
        """Version `version`, or the newest that has a checkpoint. Raises AdapterNotFound."""
        self._check(name)
        numbers = [version] if version is not None else sorted(self._version_numbers(name), reverse=True)
        for number in numbers:
            found = self._read_version(name, number)
            if found is not None and (found.checkpoints or version is not None):
                return found
        raise _missing(name, f"v{version}" if version is not None else "")

    def versions(self) -> list[AdapterVersion]:
        """Every version by name, then number; also those without a checkpoint yet."""
        if not self._root.is_dir():
            return []
        names = sorted(path.name for path in self._root.iterdir() if ADAPTER_NAME.fullmatch(path.name))
        found = (self._read_version(name, n) for name in names for n in sorted(self._version_numbers(name)))
        return [version for version in found if version is not None]

    def last_checkpoint(self, name: str, version: int) -> CheckpointRecord | None:
        """The checkpoint with the highest step of that version, if there is one."""
        found = self._read_version(name, version) if ADAPTER_NAME.fullmatch(name) else None
        return found.checkpoints[-1] if found and found.checkpoints else None

    def verify(self, record: CheckpointRecord) -> None:
        """Reads the weights and compares their digest. Raises DataLoss if they are missing or differ."""
        try:
            intact = _sha256(Path(record.path)) == record.sha256
        except FileNotFoundError:
            intact = False
        if not intact:
            raise DataLoss(f"the file of {record.id} does not match its checksum")

    def folder(self, checkpoint: CheckpointId) -> Path:
        """Where that checkpoint is, or would be. Raises AdapterNotFound for a name that is none."""
        self._check(checkpoint.name)
        return self._root / checkpoint.name / f"v{checkpoint.version}" / f"{checkpoint.step:06d}"

    # ---------------------------------------------------------------------------------------- the files
    def _check(self, name: str) -> None:
        """No path is ever made of a string that is not an adapter's name."""
        if not ADAPTER_NAME.fullmatch(name):
            raise _missing(name, "")

    def _version_numbers(self, name: str) -> Iterator[int]:
        with suppress(FileNotFoundError):
            for path in (self._root / name).iterdir():
                if match := _VERSION.fullmatch(path.name):
                    yield int(match[1])

    def _read_version(self, name: str, version: int) -> AdapterVersion | None:
        folder = self._root / name / f"v{version}"
        try:
            meta = VersionMeta(**_read_json(folder / "version.json"))
            steps = sorted(int(path.name) for path in folder.iterdir() if _STEP.fullmatch(path.name))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, TypeError) as error:
            _log.warning("version %d of adapter %s cannot be read: %s", version, name, error)
            return None
        records = (self._record(CheckpointId(name, version, step)) for step in steps)
        return AdapterVersion(meta, tuple(record for record in records if record is not None))

    def _record(self, checkpoint: CheckpointId) -> CheckpointRecord | None:
        """None if it is not there, or (with a warning in the log) damaged: one bad file hides only itself."""
        folder = self.folder(checkpoint)
        try:
            return CheckpointRecord(
                checkpoint, str(folder / ADAPTER_FILE), **_read_json(folder / "manifest.json")
            )
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            _log.warning("the manifest of %s in %s cannot be read: %s", checkpoint, folder, error)
            return None


def _missing(name: str, selector: str) -> AdapterNotFound:
    full = f"{name[:80]}@{selector}" if selector else name[:80]
    return AdapterNotFound(f"there is no adapter {full!r}", name=full)


def _version_gone(checkpoint: CheckpointId) -> AdapterNotFound:
    return _missing(checkpoint.name, f"v{checkpoint.version}")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True, allow_nan=False))


def _read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} holds no object")
    return content


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
