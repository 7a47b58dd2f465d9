"""What the front knows of one unfinished training beyond its record."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable

from atelier_server.core import Priority, State
from atelier_server.jobs.records import TrainingRecord
from atelier_server.messages import TrainingProgress
from atelier_server.origin import NOWHERE, Origin

SUSPECT_CRASHES = 2
_PROGRESS_SECONDS = 0.25  # at most four progress events a second and training


class Run:
    """`step` is the last that the worker told; `show` gets the progress that is worth a line in the log.

    `submitted`: the worker has it. `suspect`: it was there at several crashes in a row at `crash_step`.
    """

    def __init__(
        self,
        record: TrainingRecord,
        show: Callable[[Run, TrainingProgress], None],
        *,
        origin: Origin = NOWHERE,
    ) -> None:
        self.id = record.id
        self.number = record.number
        self.adapter = record.adapter
        self.version = record.version
        self.recipe = record.recipe
        self.step = record.step
        self.origin = origin
        self.submitted = False
        self.started = False
        self.paused = record.state is State.PAUSED
        self.crash_step = record.crash_step
        self.suspect = record.crash_count >= SUSPECT_CRASHES
        self.checkpoints: set[int] = set()  # steps whose event is written
        self.freed: set[int] = set()  # steps of which only the weights are left
        self._show = show
        self._held: TrainingProgress | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._shown_at = -math.inf

    @property
    def priority(self) -> Priority:
        return self.recipe.priority

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
