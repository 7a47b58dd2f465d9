"""One lane: things are done one after another, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from atelier_server.errors import StorageFull

T = TypeVar("T")
_log = logging.getLogger(__name__)
_RETRIES = 60
_RETRY_SECONDS = 1.0


class Lane:
    """What fails for lack of disk space is tried again for a minute: a full disk stops a log for a while,
    it does not tear it. Other failures are logged; the lane goes on.
    """

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Callable[[], Awaitable[None]] | None] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._drive(), name="training-lane")

    async def stop(self) -> None:
        """Does what has been asked for, then ends. Idempotent."""
        if self._task is not None:
            self._queue.put_nowait(None)
            await self._task
            self._task = None

    def put(self, action: Callable[[], Awaitable[None]]) -> None:
        self._queue.put_nowait(action)

    async def call(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs `function` when everything before it is done; its result, or what it raises."""
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
        while (action := await self._queue.get()) is not None:
            try:
                await self._persist(action)
            except Exception:
                _log.exception("an event of a training could not be written")

    async def _persist(self, action: Callable[[], Awaitable[None]]) -> None:
        for attempt in range(_RETRIES):
            try:
                return await action()
            except (StorageFull, OSError) as error:
                _log.error("the book of trainings cannot be written (try %d): %s", attempt + 1, error)
                await asyncio.sleep(_RETRY_SECONDS)
        return None
