"""Brings a folder of the first release into the layout of today. Torch-free.

ROOT/NAME/v1/version.json                   as now, but below ROOT/names
ROOT/NAME/v1/000750/manifest.json           digest, size, loss, rank, alpha, time
ROOT/NAME/v1/000750/adapter.safetensors     and the other files of the checkpoint
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from atelier_server.adapters.blobs import Blobs, StoredFile
from atelier_server.adapters.catalog import ADAPTER_FILE
from atelier_server.adapters.objects import LocalObjects
from atelier_server.core import ADAPTER_NAME

_VERSION = re.compile(r"v[1-9][0-9]*")
_log = logging.getLogger(__name__)


def migrate(objects: LocalObjects, blobs: Blobs) -> int:
    """Moves every version of the old layout; returns how many. Cut short, it goes on where it was."""
    root, count = objects.file(""), 0
    found = sorted(root.glob("*/v*/version.json"))
    for path in found:
        folder = path.parent
        if not (_VERSION.fullmatch(folder.name) and ADAPTER_NAME.fullmatch(folder.parent.name)):
            continue
        target = f"names/{folder.parent.name}/{folder.name}"
        for step in sorted(folder.glob("[0-9]*/manifest.json")):
            _checkpoint(step.parent, target, objects, blobs)
        objects.create(f"{target}/version.json", path.read_bytes())  # last: now it is visible, and whole
        shutil.rmtree(folder)
        with suppress(OSError):
            folder.parent.rmdir()
        count += 1
    if count:
        _log.info("moved %d versions of adapters into the store's new layout", count)
    return count


def _checkpoint(folder: Path, target: str, objects: LocalObjects, blobs: Blobs) -> None:
    """A manifest that cannot be read is carried over: its checkpoint stays, shown as damaged."""
    files, _ = blobs.put_folder(folder)
    files.pop("manifest.json", None)
    data = (folder / "manifest.json").read_bytes()
    with suppress(ValueError, KeyError, TypeError):
        manifest: dict[str, Any] = json.loads(data)
        sha256, size = manifest.pop("sha256"), manifest.pop("size_bytes")
        if ADAPTER_FILE in files and files[ADAPTER_FILE].sha256 == sha256:
            weights = files[ADAPTER_FILE]
        else:  # rotten already: named by what it should be, so that loading it says so
            missing = f"{sha256[:2]}/{sha256}-0"
            weights = StoredFile(sha256, size, missing)
        files[ADAPTER_FILE] = weights
        manifest |= {"id": uuid.uuid4().hex, "files": {name: asdict(file) for name, file in files.items()}}
        data = json.dumps(manifest, indent=1, sort_keys=True).encode()
    objects.create(f"{target}/{folder.name}.json", data)
