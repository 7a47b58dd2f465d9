"""What the store's small objects say: versions, checkpoints, tags, notes. Torch-free.

    names/[@TENANT/]NAME/v1/version.json            what the version was made for; an import's checkpoint too
    names/[@TENANT/]NAME/v1/000750.json             a checkpoint of step 750: files, loss, rank, alpha, time
    names/[@TENANT/]NAME/v1/thumbnail/000750.webp   a small picture painted at step 750
    names/[@TENANT/]NAME/v1/deleted/000001.json     registers: the value with the highest number holds,
    names/[@TENANT/]NAME/v1/note/000001.json        and setting one is creating the next number
    names/[@TENANT/]NAME/tags/TAG/000001.json

All of them are written once, so what has been read is remembered; a listing tells what is new.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from atelier_server.adapters.blobs import Blobs, StoredFile
from atelier_server.adapters.objects import Objects
from atelier_server.adapters.records import AdapterVersion, CheckpointRecord, VersionMeta
from atelier_server.core import SCOPED_NAME, CheckpointId

ADAPTER_FILE = "adapter.safetensors"
VERSION_TAG = re.compile(r"v([1-9][0-9]{0,8})(?:@([0-9]+))?")
_KEY = re.compile(r"names/(?:@([^/]+)/)?([^/]+)/(?:v([1-9][0-9]*)|tags)/(.+)")
_CHECKPOINT = re.compile(r"([0-9]{6,})\.json")
_NUMBERED = re.compile(r"([a-z][a-z0-9-]*)/([0-9]{6,})\.([a-z]+)")
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """What a register holds: the number of the entry, and what it says. Number 0 is a register never set."""

    number: int = 0
    content: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class VersionEntries:
    """The keys of one version. `registers`: name -> number -> key."""

    meta: str = ""
    checkpoints: dict[int, str] = field(default_factory=dict)
    registers: dict[str, dict[int, str]] = field(default_factory=dict)


@dataclass(slots=True)
class NameEntries:
    """The keys of one adapter."""

    versions: dict[int, VersionEntries] = field(default_factory=dict)
    tags: dict[str, dict[int, str]] = field(default_factory=dict)


def folder(name: str) -> str:
    """Where an adapter's small objects are: its name, or @TENANT/NAME. ValueError for a name that is none."""
    if not SCOPED_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no adapter's name")
    return f"names/@{name}" if "/" in name else f"names/{name}"


class Catalog:
    """Reads the small objects; `listed` is the one request that tells what there is."""

    def __init__(self, objects: Objects, blobs: Blobs) -> None:
        self._objects = objects
        self._blobs = blobs
        self._known: dict[str, tuple[str, bytes]] = {}

    def listed(self, prefix: str = "names") -> dict[str, NameEntries]:
        """The keys of every adapter below `prefix`, by (scoped) name; small contents are read on the way."""
        stamps = self._objects.keys(prefix)
        self._learn({key: stamp for key, stamp in stamps.items() if key.endswith(".json")})
        found: dict[str, NameEntries] = {}
        for key in stamps:
            if match := _KEY.fullmatch(key):
                tenant, name, version, rest = match.groups()
                entries = found.setdefault(f"{tenant}/{name}" if tenant else name, NameEntries())
                if version is not None:
                    _file(entries.versions.setdefault(int(version), VersionEntries()), rest, key)
                elif numbered := _NUMBERED.fullmatch(rest):
                    entries.tags.setdefault(numbered[1], {})[int(numbered[2])] = key
        return {name: entries for name, entries in found.items() if SCOPED_NAME.fullmatch(name)}

    def value(self, numbers: Mapping[int, str] | None) -> Value:
        """What a register holds."""
        if not numbers:
            return Value()
        number = max(numbers)
        return Value(number, self.content(numbers[number]) or {})

    def content(self, key: str) -> dict[str, Any] | None:
        """A small object that has been listed; None (with a warning in the log) if it is damaged or gone."""
        try:
            content = json.loads(self._known[key][1])
            if not isinstance(content, dict):
                raise TypeError("is no object")
        except (KeyError, ValueError, TypeError) as error:
            _log.warning("%s cannot be read: %s", key, error)
            return None
        return content

    def _meta(self, name: str, version: int, entries: VersionEntries) -> VersionMeta | None:
        """None if the version was never finished; a damaged one has a name and a number only."""
        if not entries.meta:
            return None
        content = self.content(entries.meta)
        try:
            return _filled(VersionMeta, {**(content or {}), "name": name, "version": version})
        except TypeError as error:
            _log.warning("%s cannot be read: %s", entries.meta, error)
            return VersionMeta(name, version, "", "", "", "", 0.0)

    def manifest(self, entries: VersionEntries, step: int) -> dict[str, Any] | None:
        """A checkpoint's manifest: its own object, or part of an import's version.json; None if damaged."""
        if step in entries.checkpoints:
            return self.content(entries.checkpoints[step])
        part = (self.content(entries.meta) or {}).get("checkpoint")
        return part if isinstance(part, dict) else None

    def steps(self, entries: VersionEntries) -> list[int]:
        """The steps of a version's checkpoints, in order."""
        meta = (self.content(entries.meta) if entries.meta else None) or {}
        imported = set() if meta.get("checkpoint") is None else {0}
        return sorted(imported | set(entries.checkpoints))

    def versions(
        self,
        name: str,
        entries: NameEntries,
        damaged: frozenset[str] | None = None,
        *,
        deleted: bool = False,
    ) -> list[AdapterVersion]:
        """The versions that are there, by number; or those that wait in the trash."""
        if damaged is None:
            damaged = self._blobs.damaged() if entries.versions else frozenset()
        tags: dict[tuple[int, int], list[str]] = {}
        for tag, numbers in entries.tags.items():
            target = self.value(numbers).content
            if target.get("version"):
                tags.setdefault((target["version"], target["step"]), []).append(tag)
        found = []
        for number in sorted(entries.versions):
            version = entries.versions[number]
            state = self.value(version.registers.get("deleted")).content
            meta = self._meta(name, number, version)
            if meta is None or state.get("purged") or (state.get("time") is not None) is not deleted:
                continue
            records = [
                self._record(CheckpointId(name, number, step), version, damaged, tags)
                for step in self.steps(version)
            ]
            note = self.value(version.registers.get("note")).content.get("text", "")
            pictures = version.registers.get("thumbnail", {})
            thumbnail = pictures[max(pictures)] if pictures else ""
            found.append(AdapterVersion(meta, tuple(records), note, state.get("time"), thumbnail))
        return found

    def _record(
        self,
        checkpoint: CheckpointId,
        entries: VersionEntries,
        damaged: frozenset[str],
        tags: Mapping[tuple[int, int], list[str]],
    ) -> CheckpointRecord:
        """One damaged file damages only its checkpoint."""
        own = tuple(sorted(tags.get((checkpoint.version, checkpoint.step), ())))
        try:
            manifest = self.manifest(entries, checkpoint.step) or {}
            files = stored_files(manifest)
            weights = files[ADAPTER_FILE]
            return CheckpointRecord(
                id=checkpoint,
                path=str(self._blobs.path(weights)),
                sha256=weights.sha256,
                size_bytes=weights.size_bytes,
                create_time=float(manifest["create_time"]),
                loss=manifest["loss"],
                rank=int(manifest["rank"]),
                lora_alpha=float(manifest["lora_alpha"]),
                validation_loss=manifest.get("validation_loss"),
                kept_share=manifest.get("kept_share"),
                files=files,
                tags=own,
                damaged=not damaged.isdisjoint(file.sha256 for file in files.values()),
            )
        except (KeyError, TypeError, ValueError):
            return CheckpointRecord(checkpoint, "", "", 0, 0.0, None, 0, 0.0, tags=own, damaged=True)

    def _learn(self, stamps: Mapping[str, str]) -> None:
        unknown = [key for key, stamp in stamps.items() if self._known.get(key, ("",))[0] != stamp]
        for key, data in self._objects.read(unknown).items():
            self._known[key] = (stamps[key], data)


def _file(entries: VersionEntries, rest: str, key: str) -> None:
    """Puts a key where it belongs in its version; what we did not write is passed over."""
    if rest == "version.json":
        entries.meta = key
    elif match := _CHECKPOINT.fullmatch(rest):
        entries.checkpoints[int(match[1])] = key
    elif match := _NUMBERED.fullmatch(rest):
        entries.registers.setdefault(match[1], {})[int(match[2])] = key


def stored_files(manifest: Mapping[str, Any]) -> dict[str, StoredFile]:
    """The files that a manifest names. Raises KeyError, TypeError or ValueError if it is damaged."""
    return {str(name): _filled(StoredFile, dict(file)) for name, file in manifest["files"].items()}


def _filled(kind: type[T], content: Mapping[str, Any]) -> T:
    """A dataclass out of what is known of it; fields of a later release are passed over."""
    known = {f.name for f in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in known})
