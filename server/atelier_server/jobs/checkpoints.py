"""The checkpoints of trainings: told in their logs, painted, removed when newer ones take their place."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence

from atelier_server.adapters.store import AdapterStore, CheckpointRecord
from atelier_server.core import CheckpointId, Recipe
from atelier_server.errors import AdapterNotFound, AtelierError
from atelier_server.jobs import thumbnails
from atelier_server.jobs.records import Checkpointed, Sampled
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.training_run import Run
from atelier_server.messages import CheckpointPublished, SampleReady
from atelier_server.metrics import Metrics

_log = logging.getLogger(__name__)


class Checkpoints:
    """`in_use` tells whether a generation that has not finished needs a checkpoint."""

    def __init__(
        self,
        log: TrainingLog,
        store: AdapterStore,
        metrics: Metrics,
        in_use: Callable[[CheckpointId], bool],
    ) -> None:
        self._log = log
        self._store = store
        self._metrics = metrics
        self._in_use = in_use

    async def last(self, run: Run) -> CheckpointRecord | None:
        """What the training goes on from, and what is recommended."""
        return await asyncio.to_thread(self._store.last_checkpoint, run.adapter, run.version)

    async def published(self, run: Run, event: CheckpointPublished) -> None:
        """Writes one down that the worker tells of."""
        step = event.checkpoint.step
        told = Checkpointed(
            step,
            str(event.checkpoint),
            event.sha256,
            event.size_bytes,
            event.loss,
            event.validation_loss,
            event.kept_share,
        )
        await self._written(run, told)

    async def reconcile(self, run: Run) -> None:
        """Those that reached the store while their event was lost on the way are written first."""
        logged = await self._log.book.do(self._log.book.events_of, run.id, "checkpoint")
        run.checkpoints = {e.payload.step for e in logged if isinstance(e.payload, Checkpointed)}
        for kept in await asyncio.to_thread(_checkpoints_of, self._store, run.adapter, run.version):
            loss = math.nan if kept.loss is None else kept.loss
            facts = (kept.validation_loss, kept.kept_share)
            told = Checkpointed(kept.id.step, str(kept.id), kept.sha256, kept.size_bytes, loss, *facts)
            await self._written(run, told)

    async def _written(self, run: Run, told: Checkpointed) -> None:
        """Once."""
        if told.step not in run.checkpoints:
            await self._log.append(run.id, told, step=told.step)
            run.checkpoints.add(told.step)
            self._metrics.stored_changed(1)

    async def painted(self, run: Run, event: SampleReady) -> None:
        """Keeps a sample picture; that of the first prompt is shown in lists as well."""
        file = await self._log.keep_sample(run.id, event.step, event.index, event.mime_type, event.data)
        sample = Sampled(event.step, event.index, event.prompt, event.seed, event.mime_type, file)
        await self._log.append(run.id, sample)
        if event.index == 0:
            checkpoint = CheckpointId(run.adapter, run.version, event.step)
            await asyncio.to_thread(thumbnails.keep, self._store, checkpoint, event.data)

    async def prune(self, run: Run) -> None:
        """Removes what the recipe does not keep, and of what it keeps all that only the newest needs.

        What cannot be removed now is the next one's to remove.
        """

        def prune() -> None:
            records = _checkpoints_of(self._store, run.adapter, run.version)
            for record in superseded(records, run.recipe):
                if not self._in_use(record.id):
                    self._store.remove_checkpoint(record.id)
            for record in records[:-1]:
                if record.id.step not in run.freed:
                    self._store.forget_state(record.id)
                    run.freed.add(record.id.step)

        try:
            await asyncio.to_thread(prune)
        except (AtelierError, OSError) as error:
            _log.warning("old checkpoints of %s stay: %s", run.adapter, error, extra={"training": run.id})

    async def count(self) -> None:
        """Tells the metrics how many the store holds."""
        self._metrics.stored_checkpoints(await asyncio.to_thread(count_checkpoints, self._store))


def superseded(records: Sequence[CheckpointRecord], recipe: Recipe) -> list[CheckpointRecord]:
    """Those, of one version and by step, that its recipe does not keep: all but the last `keep_last`, every
    `keep_every`-th step, and what has a tag. The last one, which is recommended, always stays.
    """
    if not recipe.keep_last:
        return []
    return [
        record
        for record in records[: -recipe.keep_last]
        if not record.tags and not (recipe.keep_every and record.id.step % recipe.keep_every == 0)
    ]


def count_checkpoints(store: AdapterStore) -> int:
    """How many checkpoints the store holds."""
    return sum(len(version.checkpoints) for version in store.versions())


def _checkpoints_of(store: AdapterStore, name: str, version: int) -> tuple[CheckpointRecord, ...]:
    try:
        return store.version(name, version).checkpoints
    except AdapterNotFound:
        return ()  # deleted by hand: the training starts again from nothing, or the worker refuses it
