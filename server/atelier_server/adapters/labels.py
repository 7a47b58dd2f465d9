"""What may change about an adapter: tags, notes, thumbnails. Torch-free.

A tag is a register: moving it is creating its next number, which one of several can do; so a move that
expects an old target is refused if somebody else has moved it in between.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping
from enum import Enum
from typing import Any

from atelier_server.adapters import catalog
from atelier_server.adapters.catalog import Catalog, NameEntries, Value
from atelier_server.adapters.objects import Objects
from atelier_server.core import CheckpointId
from atelier_server.errors import AdapterNotFound, TagMoved

TAG = re.compile(r"(?!v[0-9]+$)[a-z]([a-z0-9-]{0,30}[a-z0-9])?")
_RACES = 20


class Expect(Enum):
    """What a tag has to be on for a move to happen, where it is no checkpoint."""

    ANYTHING = "anything"
    NOTHING = "nothing"


class Labels:
    """The labels of a store's adapters. Whether an adapter or a checkpoint exists is the caller's to know."""

    def __init__(self, objects: Objects, catalog: Catalog) -> None:
        self._objects = objects
        self._catalog = catalog

    def tag(
        self, name: str, tag: str, target: CheckpointId | None, expected: CheckpointId | Expect
    ) -> CheckpointId | None:
        """Puts `tag` on a checkpoint of `name`, or takes it away (None); returns what it was on.

        Raises TagMoved if it is not on what is expected, AdapterNotFound if there is no tag to take away.
        """
        if not TAG.fullmatch(tag):
            raise ValueError(f"{tag!r} is no tag")
        for _ in range(_RACES):
            now = self._catalog.value(self._entries(name).tags.get(tag))
            was = _target(name, now)
            if expected is not Expect.ANYTHING and was != (None if expected is Expect.NOTHING else expected):
                here = _shown(was or Expect.NOTHING)
                raise TagMoved(f"tag {tag!r} of {name} is on {here}, not on {_shown(expected)}")
            if target is None and was is None:
                raise AdapterNotFound(f"{name} has no tag {tag!r}", name=f"{name}@{tag}")
            if was == target:
                return was
            content = {"version": target.version, "step": target.step} if target else {}
            if self._set(f"{catalog.folder(name)}/tags/{tag}", now, content):
                return was
        raise TagMoved(f"tag {tag!r} of {name} is being moved by others")

    def note(self, name: str, version: int, text: str) -> None:
        """Writes a note on a version in place of the one before; the last of several at once holds."""
        for _ in range(_RACES):
            entries = self._entries(name).versions.get(version)
            now = self._catalog.value(entries.registers.get("note") if entries else None)
            if self._set(f"{catalog.folder(name)}/v{version}/note", now, {"text": text}):
                return
        raise TagMoved(f"the note on {name}@v{version} is being written by others")

    def set_thumbnail(self, checkpoint: CheckpointId, webp: bytes) -> None:
        """A small picture of a version; the one of the highest step is shown. Idempotent."""
        folder = f"{catalog.folder(checkpoint.name)}/v{checkpoint.version}"
        self._objects.create(f"{folder}/thumbnail/{checkpoint.step:06d}.webp", webp)

    def thumbnails(self, keys: list[str]) -> dict[str, bytes]:
        """The pictures that versions name; one that is gone is left out."""
        return self._objects.read(key for key in keys if key)

    def _entries(self, name: str) -> NameEntries:
        return self._catalog.listed(catalog.folder(name)).get(name, NameEntries())

    def _set(self, register: str, now: Value, content: Mapping[str, Any]) -> bool:
        return set_register(self._objects, register, now, content)


def set_register(objects: Objects, register: str, now: Value, content: Mapping[str, Any]) -> bool:
    """Makes `content` what a register holds; False if it does not hold `now` any more."""
    entry = {**content, "set_time": time.time(), "id": uuid.uuid4().hex}
    return objects.create(f"{register}/{now.number + 1:06d}.json", json.dumps(entry).encode())


def _target(name: str, value: Value) -> CheckpointId | None:
    content = value.content
    return CheckpointId(name, content["version"], content["step"]) if content.get("version") else None


def _shown(expected: CheckpointId | Expect) -> str:
    return f"v{expected.version}@{expected.step}" if isinstance(expected, CheckpointId) else expected.value
