"""One lane: things are done one after another, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from itertools import count
from typing import TypeVar

from sqlalchemy.exc import OperationalError

from atelier_server.errors import ServerDraining, StorageFull

T = TypeVar("T")
_log = logging.getLogger(__name__)
TRIES = 60
_RETRY_SECONDS = 1.0


class Lane:
    """What fails for want of a disk is tried again: a full disk stops a log for a while, it does not tear it.
    Other failures are logged; the lane goes on.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[tuple[Callable[[], Awaitable[None]], int | None] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None
        self._stopping = False

    def start(self) -> None:
        self._task = asyncio.create_task(self._drive(), name="training-lane")

    async def stop(self) -> None:
        """Does what has been asked for, then ends. Idempotent."""
        self._stopping = True
        if self._task is not None:
            self._queue.put_nowait(None)
            await self._task
            self._task = None

    def put(self, action: Callable[[], Awaitable[None]], *, tries: int | None = TRIES) -> None:
        """`tries`, a second apart, as long as the disk refuses; None: till it works or the lane stops."""
        self._queue.put_nowait((action, tries))

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs `function` when everything before it is done; its result, or what it raises.

        Raises ServerDraining once the lane stops: nothing that comes later is ever done.
        """
        if self._stopping:
            raise ServerDraining("the server is going away")
        answer: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        async def run() -> None:
            try:
                result = await function()
            except Exception as error:
                if not answer.cancelled():
                    answer.set_exception(error)
            else:
                if not answer.cancelled():
                    answer.set_result(result)

        self.put(run)
        return await answer

    async def _drive(self) -> None:
        while (item := await self._queue.get()) is not None:
            try:
                await self._persist(*item)
            except Exception:
                _log.exception("an event of a training could not be written")

    async def _persist(self, action: Callable[[], Awaitable[None]], tries: int | None) -> None:
        for attempt in count(1):
            try:
                return await action()
            except (StorageFull, OperationalError, OSError) as error:
                _log.error("the book of trainings cannot be written (try %d): %s", attempt, error)
                if attempt == tries or self._stopping:
                    return None
                await asyncio.sleep(_RETRY_SECONDS)
        return None
