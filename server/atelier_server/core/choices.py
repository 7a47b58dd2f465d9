"""Words with a fixed set of values."""

from __future__ import annotations

from enum import IntEnum, StrEnum


class State(StrEnum):
    """The life of a training."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self in (State.SUCCEEDED, State.FAILED, State.CANCELLED)


class Mode(StrEnum):
    """The reproducibility promise of a generation."""

    FAST = "fast"
    STRICT = "strict"


class Priority(IntEnum):
    """How much of the device a generation gets beside others: each step up counts four times as much."""

    LOW = 1
    NORMAL = 2
    HIGH = 3


class ImageFormat(StrEnum):
    """The file format of a finished picture."""

    PNG = "png"
    JPEG = "jpeg"
    WEBP = "webp"

    @property
    def mime_type(self) -> str:
        return f"image/{self.value}"
