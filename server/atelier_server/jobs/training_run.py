"""What the front knows of one unfinished training beyond its record."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from atelier_server.messages import TrainingProgress
from atelier_server.origin import NOWHERE, Origin

_PROGRESS_SECONDS = 0.25  # at most four progress events a second and training


class Run:
    """`step` is the last that the worker told; `show` gets the progress that is worth a line in the log."""

    def __init__(
        self,
        training: str,
        adapter: str,
        version: int,
        step: int,
        show: Callable[[Run, TrainingProgress], None],
        *,
        origin: Origin = NOWHERE,
    ) -> None:
        self.id = training
        self.adapter = adapter
        self.version = version
        self.step = step
        self.origin = origin
        self.submitted = False
        self.started = False
        self.checkpoints: set[int] = set()
        self._show = show
        self._held: TrainingProgress | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._shown_at = -math.inf

    def progress(self, event: TrainingProgress) -> None:
        """Shown now, or held until enough time has passed; a later one takes its place meanwhile."""
        loop = asyncio.get_running_loop()
        self.step, self._held = event.step, event
        wait = self._shown_at + _PROGRESS_SECONDS - loop.time()
        if wait <= 0:
            self.flush()
        elif self._timer is None:
            self._timer = loop.call_later(wait, self.flush)

    def flush(self) -> None:
        """Shows what is held: before anything else is said of this training."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._held is not None:
            self._show(self, self._held)
            self._held = None
            self._shown_at = asyncio.get_running_loop().time()
