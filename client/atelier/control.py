"""ControlNets as a caller names them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from atelier import transfer
from atelier.events import Picture
from atelier.v1 import generation_pb2

_TEXT = re.compile(
    r"(?P<name>[^=]+)=(?P<file>.+?)(:(?P<scale>-?[\d.]+)(:(?P<start>[\d.]+)-(?P<end>[\d.]+))?)?"
)
_NUMBER = re.compile(r":-?[\d.]+(-[\d.]+)?$")


@dataclass(frozen=True, slots=True)
class Control:
    """A ControlNet that the server has loaded, and the picture that guides it (a path, a file's bytes).

    `scale` times what it says (default 1), in the steps between the shares `start` and `end` (default 0, 1).
    """

    name: str
    image: str | Path | bytes | Picture
    scale: float | None = None
    start: float | None = None
    end: float | None = None

    @classmethod
    def of(cls, text: str) -> Control:
        """NAME=FILE[:SCALE[:START-END]]. ValueError for anything else."""
        match = _TEXT.fullmatch(text)
        if match is None or (_NUMBER.search(match["file"]) and not Path(match["file"]).exists()):
            raise ValueError(f"{text!r} is not NAME=FILE[:SCALE[:START-END]]")
        try:
            numbers = [float(match[key]) if match[key] else None for key in ("scale", "start", "end")]
        except ValueError as error:
            raise ValueError(f"{text!r}: {error}") from None
        return cls(match["name"], match["file"], *numbers)

    @classmethod
    def several(cls, given: str | Control | Iterable[str | Control]) -> list[Control]:
        """Of one or several, as text or as they are. ValueError for what is not NAME=FILE[...]."""
        each = [given] if isinstance(given, str | Control) else given
        return [cls.of(one) if isinstance(one, str) else one for one in each]

    def message(self) -> generation_pb2.ControlNetSelection:
        """OSError where the picture cannot be read."""
        return generation_pb2.ControlNetSelection(
            name=self.name,
            image=transfer.picture_bytes(self.image),
            scale=self.scale,
            start=self.start,
            end=self.end,
        )
