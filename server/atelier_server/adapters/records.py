"""A version and its checkpoints, as the store tells of them. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from atelier_server.adapters.blobs import StoredFile
from atelier_server.core import CheckpointId

REPORT_FILE = "report.json"
"""What an import understood, beside its weights: `core.AdapterReport`."""

TRAINING_STATE = "training-state"
"""So begin the files that only a training needs, to go on from its newest checkpoint: others lose them."""


@dataclass(frozen=True, slots=True)
class VersionMeta:
    """One version of an adapter. `training` is the id of the training that made it, "" for an import.

    `owner` is the server that took the training, `family` its base model's. `recipe` holds how it was
    trained, field by field.
    """

    name: str
    version: int
    trigger: str
    base_model: str
    base_sha256: str
    training: str
    create_time: float
    owner: str = ""
    family: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """One published checkpoint. `path` is its safetensors file on this machine; size and digest are that
    file's.

    `loss` is the mean training loss since the checkpoint before, None for an import; `validation_loss` that
    on pictures which are not learned; `kept_share` what an extraction kept of the change. Times are in
    seconds since the epoch. `damaged`: its file is in quarantine, or its manifest cannot be read.
    """

    id: CheckpointId
    path: str
    sha256: str
    size_bytes: int
    create_time: float
    loss: float | None
    rank: int
    lora_alpha: float
    validation_loss: float | None = None
    kept_share: float | None = None
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    damaged: bool = False


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A version with its checkpoints by step. `delete_time` is None unless it waits to be removed."""

    meta: VersionMeta
    checkpoints: tuple[CheckpointRecord, ...]
    note: str = ""
    delete_time: float | None = None
    thumbnail: str = ""

    @property
    def recommended(self) -> CheckpointRecord | None:
        """What NAME without a step means: the last, as only finite losses are published."""
        return self.checkpoints[-1] if self.checkpoints else None

    @property
    def tags(self) -> tuple[str, ...]:
        own = sorted(tag for record in self.checkpoints for tag in record.tags)
        return (f"v{self.meta.version}", *own)

    @property
    def size_bytes(self) -> int:
        """Of all stored files but those that are going to be freed."""
        files = {
            file.sha256: file.size_bytes
            for record in self.checkpoints
            for name, file in record.files.items()
            if record is self.checkpoints[-1] or not name.startswith(TRAINING_STATE)
        }
        return sum(files.values())

    @property
    def damaged(self) -> bool:
        return any(record.damaged for record in self.checkpoints)
