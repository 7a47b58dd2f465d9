"""ControlNets as every room speaks of them: what is loaded, and what a generation takes of it.

Frozen, cheap to pickle, free of torch, protobuf and gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ControlNetInfo:
    """One that the server has loaded beside its base. `sha256` is that of its weights' files."""

    name: str
    reference: str
    sha256: str


@dataclass(frozen=True, slots=True)
class ControlUse:
    """A ControlNet that guides a generation by `image`: PNG, JPEG or WebP, of the size that is asked for.

    `scale` times what it says, in the steps that lie wholly between `start` and `end` (shares, 0 to 1).
    """

    name: str
    image: bytes
    image_sha256: str
    sha256: str
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def forgotten(self) -> ControlUse:
        """Without the bytes: what a receipt needs."""
        return replace(self, image=b"")
