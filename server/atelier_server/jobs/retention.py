"""People's pictures are kept as long as the operator says, and never when nobody knows of them any more."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from atelier_server.jobs.training_log import PICTURE_FOLDERS, TrainingLog
from atelier_server.jobs.trainings import Trainings

_log = logging.getLogger(__name__)
_LONGEST_PAUSE = 3600.0
_SHORTEST_PAUSE = 1.0


class Retention:
    """Removes the uploads of trainings that ended `seconds` ago; None keeps them. `clock`: since the epoch.

    What is due follows from the book alone, so a server that was away catches up when it is back.
    """

    def __init__(
        self, trainings: Trainings, *, seconds: float | None, clock: Callable[[], float] = time.time
    ) -> None:
        self._trainings = trainings
        self._log: TrainingLog = trainings.log
        self._seconds = seconds
        self._clock = clock

    async def sweep(self) -> list[str]:
        """Removes what is due now; the trainings whose pictures went."""
        if self._seconds is None:
            return []
        due = self._clock() - self._seconds

        async def sweep() -> list[str]:
            # In turn: a training that is resumed at this moment keeps its pictures, or is refused.
            ended = await self._log.book.do(self._log.book.ended_before, due)
            gone = []
            for training in ended:
                if await asyncio.to_thread(_remove, self._log.folder(training)):
                    _log.info("the pictures of an ended training were removed", extra={"training": training})
                    gone.append(training)
            return gone

        return await self._trainings.in_turn(sweep)

    async def remove_orphans(self) -> None:
        """Before anything is accepted: folders of trainings that were never written down, or are deleted."""
        for training in await asyncio.to_thread(self._log.folders):
            if await self._log.book.do(self._log.book.training, training) is None:
                await asyncio.to_thread(self._log.remove, training)
                _log.info("the folder of a training that is not in the book was removed: %s", training)

    async def keep_house(self) -> None:
        """Sweeps for as long as the server lives."""
        if self._seconds is None:
            return
        while True:
            try:
                await self.sweep()
            except Exception:
                _log.exception("the pictures of ended trainings were not removed")
            await asyncio.sleep(min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, self._seconds / 4)))


def _remove(folder: Path) -> bool:
    """Removes the pictures in it; whether there were any. The samples, which show no upload, stay."""
    there = [folder / name for name in PICTURE_FOLDERS if (folder / name).exists()]
    for pictures in there:
        shutil.rmtree(pictures)
    return bool(there)
