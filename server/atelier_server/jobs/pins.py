"""Adapters that keep their slots until somebody lets go of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.errors import AtelierError, TooManyPins, WorkerLost, WorkerNotReady
from atelier_server.jobs.calls import Calls
from atelier_server.messages import AdapterLoaded, LoadAdapter, Sample, UnloadAdapter
from atelier_server.metrics import Metrics

_log = logging.getLogger(__name__)


class Pins:
    """What is pinned, for as long as this server lives: a new worker gets them again.

    As many slots as one picture may need stay without: whatever is pinned, every picture can be painted.
    """

    def __init__(self, calls: Calls, metrics: Metrics, *, slots: int, kept_free: int) -> None:
        self._calls = calls
        self._metrics = metrics
        self._slots = slots
        self._limit = slots - kept_free
        self._pinned: dict[CheckpointId, AdapterUse] = {}
        self._reloading: set[asyncio.Task[None]] = set()

    def pinned(self) -> frozenset[CheckpointId]:
        return frozenset(self._pinned)

    async def load(self, use: AdapterUse, *, pin: bool) -> AdapterLoaded:
        """Puts a checkpoint into a slot, for good if `pin`. Raises TooManyPins and what the worker says."""
        new = pin and use.checkpoint not in self._pinned
        if new:
            if len(self._pinned) >= self._limit:
                raise TooManyPins(
                    f"{len(self._pinned)} adapters are pinned, and of {self._slots} slots "
                    f"{self._limit} can be: the others are what one picture may need; "
                    "unload one, or give the server more --slots"
                )
            self._pinned[use.checkpoint] = use
        try:
            answer = await self._calls.call(lambda call: LoadAdapter(call, use, pin=pin), AdapterLoaded)
        except BaseException as error:
            if new:
                self.release([use.checkpoint])
                if isinstance(error, asyncio.CancelledError):  # the worker pins it all the same
                    self._calls.tell(lambda call: UnloadAdapter(call, (use.checkpoint,)))
            raise
        self._count()
        return answer

    def release(self, checkpoints: Iterable[CheckpointId]) -> None:
        """These are pinned no longer; the worker is told by whoever unloads them."""
        for checkpoint in checkpoints:
            self._pinned.pop(checkpoint, None)
        self._count()

    def worker_ready(self) -> None:
        """A new worker has nothing in its slots."""
        for use in self._pinned.values():
            task = asyncio.create_task(self._again(use), name="pin")
            self._reloading.add(task)
            task.add_done_callback(self._reloading.discard)

    async def _again(self, use: AdapterUse) -> None:
        try:
            await self._calls.call(lambda call: LoadAdapter(call, use, pin=True), AdapterLoaded)
        except (WorkerLost, WorkerNotReady):
            return  # the next one gets it
        except AtelierError as error:
            _log.warning("%s is pinned no longer: %s", use.checkpoint, error.message)
            self.release([use.checkpoint])

    def _count(self) -> None:
        self._metrics.observe(Sample("adapters_pinned", float(len(self._pinned))))
