"""Calls to the worker that have one answer: loading, unloading, importing and exporting adapters."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import TypeVar

from atelier_server.errors import AtelierError, WorkerLost, WorkerNotReady, by_reason
from atelier_server.messages import (
    AbandonCall,
    AdapterExported,
    AdapterImported,
    AdapterLoaded,
    AdapterMade,
    AdaptersDiffed,
    AdaptersUnloaded,
    CallFailed,
    CallProgress,
    Command,
)

Answer = AdapterLoaded | AdaptersUnloaded | AdapterImported | AdapterExported | AdapterMade | AdaptersDiffed
A = TypeVar(
    "A",
    AdapterLoaded,
    AdaptersUnloaded,
    AdapterImported,
    AdapterExported,
    AdapterMade,
    AdaptersDiffed,
)
Progress = Callable[[int, int], None]


class Calls:
    """Matches answers to calls. `send` hands a command to the worker; it never blocks."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        self._send = send
        self._waiting: dict[str, asyncio.Future[Answer]] = {}
        self._progress: dict[str, Progress] = {}
        self._ready = False

    @property
    def ready(self) -> bool:
        return self._ready

    async def call(
        self, command: Callable[[str], Command], answer: type[A], progress: Progress | None = None
    ) -> A:
        """Sends `command(call_id)`. Raises what the worker says, WorkerNotReady, WorkerLost.

        `progress` hears how far a long call has come. A caller that goes away ends it.
        """
        if not self._ready:
            raise WorkerNotReady("the worker is not ready")
        call_id = uuid.uuid4().hex
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = future
        if progress is not None:
            self._progress[call_id] = progress
        try:
            self._send(command(call_id))
            result = await future
        except asyncio.CancelledError:
            self._send(AbandonCall(call_id))
            raise
        finally:
            self._progress.pop(call_id, None)
            self._waiting.pop(call_id, None)
        if not isinstance(result, answer):
            raise AtelierError("the worker gave an answer to another question")
        return result

    def tell(self, command: Callable[[str], Command]) -> None:
        """Sends `command(call_id)`, whose answer nobody waits for; nothing where the worker is not there."""
        if self._ready:
            self._send(command(uuid.uuid4().hex))

    def handle(self, event: Answer | CallFailed | CallProgress) -> None:
        if isinstance(event, CallProgress):
            if (progress := self._progress.get(event.call_id)) is not None:
                progress(event.done, event.total)
            return
        future = self._waiting.get(event.call_id)
        if future is None or future.done():
            return  # the caller has gone
        if isinstance(event, CallFailed):
            error = by_reason(event.reason, event.message, dict(event.metadata), event.violations)
            future.set_exception(error)
        else:
            future.set_result(event)

    def worker_ready(self) -> None:
        self._ready = True

    def worker_lost(self) -> None:
        self._ready = False
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(WorkerLost("the worker died while it worked on this call"))
