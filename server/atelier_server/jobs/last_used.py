"""When each checkpoint was last used by this server: a small file, written now and then."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from atelier_server.core import CheckpointId

_WRITE_SECONDS = 10.0
_log = logging.getLogger(__name__)


class LastUsed:
    """Seconds since the epoch by checkpoint, kept in `path`; a kill takes at most the last seconds of it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._times = _read(path)
        self._written = time.monotonic()

    def touch(self, checkpoints: Iterable[CheckpointId]) -> None:
        now = time.time()
        self._times |= {str(checkpoint): now for checkpoint in checkpoints}
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self.write()

    def of(self, checkpoint: CheckpointId) -> float | None:
        return self._times.get(str(checkpoint))

    def keep(self, checkpoints: Iterable[CheckpointId]) -> None:
        """Forgets every other."""
        keys = {str(checkpoint) for checkpoint in checkpoints}
        self._times = {key: when for key, when in self._times.items() if key in keys}
        self.write()

    def write(self) -> None:
        self._written = time.monotonic()
        temporary = self._path.with_suffix(".part")
        try:
            temporary.write_text(json.dumps(self._times))
            temporary.replace(self._path)
        except OSError as error:  # a full disk is told by those who need it more
            _log.warning("%s cannot be written: %s", self._path, error)


def _read(path: Path) -> dict[str, float]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    known = content.items() if isinstance(content, Mapping) else ()
    return {str(key): float(when) for key, when in known if isinstance(when, int | float)}
