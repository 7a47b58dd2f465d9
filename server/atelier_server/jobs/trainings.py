"""Trainings as users see them: accepted, watched, listed, cancelled, resumed, deleted."""

from __future__ import annotations

import asyncio
import logging
import secrets
import shutil
import string
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict
from typing import TypeVar

from atelier_server import origin
from atelier_server.access.tenants import Scope, Tenant
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import BaseInfo, Costs, Recipe, State
from atelier_server.errors import (
    AdapterExists,
    FailedPrecondition,
    QueueFull,
    RequestIdReused,
    ServerDraining,
    TrainingEnded,
    TrainingNotEnded,
    TrainingNotFound,
)
from atelier_server.jobs.quotas import (
    DAY_SECONDS,
    check_steps,
    check_stored,
    check_trainings,
    stored_bytes,
)
from atelier_server.jobs.records import Accepted, LoggedEvent, TrainingDraft, TrainingRecord
from atelier_server.jobs.training_log import TrainingLog
from atelier_server.jobs.training_memory import base_bytes, demand
from atelier_server.jobs.training_runs import TrainingRuns
from atelier_server.jobs.uploads import PictureUpload
from atelier_server.origin import Origin

_log = logging.getLogger(__name__)

T = TypeVar("T")
_ID_LETTERS = string.ascii_lowercase + string.digits


class Trainings:
    """`costs` tells what painting costs, as the worker has measured it."""

    def __init__(
        self,
        log: TrainingLog,
        runs: TrainingRuns,
        store: AdapterStore,
        *,
        limit: int,
        costs: Callable[[], Costs],
    ) -> None:
        self._log = log
        self._book = log.book
        self._runs = runs
        self._store = store
        self._limit = limit
        self._costs = costs
        self.draining = False

    # ------------------------------------------------------------------------------------------- create
    async def check(self, draft: TrainingDraft, tenant: Tenant) -> TrainingRecord | None:
        """Before the pictures are read: the training that this request_id already has, if any.

        Raises RequestIdReused, AdapterExists, QueueFull, QuotaExceeded, OutOfMemory, ServerDraining.
        """
        known = await self._book.do(self._book.requested, draft.request_id)
        if known is not None:
            if known.recipe_hash != draft.recipe_hash:
                raise _reused(draft.request_id)
            return known
        if self.draining:
            raise ServerDraining("the server is going away")
        # Full for those who are in it, as the queue of generations.
        if self._runs.count >= self._limit and self._runs.count_of(tenant.scope.owns):
            raise QueueFull(f"{self._limit} trainings are waiting or running")
        if not draft.new_version and await asyncio.to_thread(self.taken, draft.name):
            raise AdapterExists(f"adapter {draft.name!r} exists; set new_version to go on", name=draft.name)
        await self._check_quotas(tenant, draft.recipe.max_train_steps)
        self._runs.admission.check(draft.recipe)
        return None

    async def _check_quotas(self, tenant: Tenant, steps: int) -> None:
        """Raises QuotaExceeded."""
        scope, now = tenant.scope, time.time()
        check_trainings(tenant, self._runs.count_of(scope.owns))
        if tenant.quotas.max_train_steps_per_day is not None:
            asked = await self._book.do(self._book.steps_since, scope.tenant, now - DAY_SECONDS)
            check_steps(tenant, asked, steps, now)
        if tenant.quotas.max_stored_bytes is not None:
            held = await asyncio.to_thread(stored_bytes, self._store, scope)
            check_stored(tenant, held, 1)

    def same_pictures(self, known: TrainingRecord, upload: PictureUpload) -> None:
        """A repeat that sends its pictures must send the same. Raises RequestIdReused."""
        if upload.pictures and upload.images_hash != known.images_hash:
            raise _reused(known.request_id)

    async def accept(
        self, draft: TrainingDraft, upload: PictureUpload, base: BaseInfo, tenant: Tenant
    ) -> TrainingRecord:
        """Writes the training down; from here on it survives anything. Its pictures are moved to it."""
        # Shielded: a client that leaves now has a whole training or none, and nothing half made.
        came_from = origin.current()
        return await self.in_turn(lambda: self._accept(draft, upload, base, tenant, came_from))

    async def _accept(
        self,
        draft: TrainingDraft,
        upload: PictureUpload,
        base: BaseInfo,
        tenant: Tenant,
        came_from: Origin,
    ) -> TrainingRecord:
        # The same request may have come twice at once: the first to get here wins.
        if (known := await self.check(draft, tenant)) is not None:
            self.same_pictures(known, upload)
            return known
        training = await self._free_id(draft.name)
        meta = await asyncio.to_thread(
            self._store.create_version,
            name=draft.name,
            trigger=draft.recipe.instance_prompt,
            base_model=base.reference,
            base_sha256=base.sha256,
            training=training,
            # `check` has let it pass: versions that may be there have nothing in them.
            new_version=True,
            family=base.family,
            recipe=asdict(draft.recipe),
        )
        record = TrainingRecord(
            id=training,
            request_id=draft.request_id,
            recipe_hash=draft.recipe_hash,
            images_hash=upload.images_hash,
            adapter=draft.name,
            version=meta.version,
            new_version=draft.new_version,
            recipe=draft.recipe,
            images=upload.pictures,
            create_time=time.time(),
        )
        seconds = estimated_seconds(draft.recipe, base, self._costs().row_seconds)
        needed = base_bytes(base) + demand(draft.recipe, base, self._costs()).total
        accepted = Accepted(draft.name, meta.version, seconds, needed)
        try:
            await upload.move_to(self._log.folder(training) / "images")
            record = await self._book.do(self._book.insert, record, accepted, *draft.warnings)
        except BaseException:
            await asyncio.to_thread(self._store.discard, draft.name, meta.version)
            await asyncio.to_thread(shutil.rmtree, self._log.folder(training), ignore_errors=True)
            raise
        ids = {"training": training, "adapter": draft.name, "request_id": came_from.request_id}
        _log.info("training accepted", extra=ids)
        await self._runs.add(record, came_from)
        return record

    async def sweep(self) -> None:
        """Removes versions that a server made for a training which it did not live to write down."""
        for version in await asyncio.to_thread(self._store.versions):
            training = version.meta.training
            # Another server's are none of ours: its book is not this one.
            if training and not version.checkpoints and version.meta.owner in ("", self._store.owner):
                known = await self._book.do(self._book.training, training)
                owner = await self._book.do(self._book.latest, version.meta.name)
                if known is None and owner is None:
                    await asyncio.to_thread(self._store.discard, version.meta.name, version.meta.version)

    # --------------------------------------------------------------------------------------------- read
    async def find(self, name: str) -> TrainingRecord:
        """By id, or by an adapter's name meaning its latest training. Raises TrainingNotFound."""
        record = await self._book.do(self._book.training, name)
        record = record or await self._book.do(self._book.latest, name)
        if record is None:
            raise TrainingNotFound(f"there is no training {name[:100]!r}", name=name[:100])
        return record

    async def page(self, scope: Scope, before: int | None, size: int) -> list[TrainingRecord]:
        """A tenant's, newest first, with numbers below `before`."""
        return await self._book.do(self._book.page, scope.tenant, before, size)

    def watch(self, training: str, after_seq: int) -> AsyncGenerator[LoggedEvent, None]:
        """See TrainingLog.watch."""
        return self._log.watch(training, after_seq)

    @property
    def log(self) -> TrainingLog:
        return self._log

    def writes(self, adapter: str, version: int | None) -> bool:
        """Whether an unfinished training writes that adapter, or that version of it."""
        return self._runs.writes(adapter, version)

    async def in_turn(self, function: Callable[[], Awaitable[T]]) -> T:
        """Runs `function` while nothing else happens to any training, to its end."""
        return await asyncio.shield(self._runs.lane.call(function))

    # ------------------------------------------------------------------------------------------- change
    async def cancel(self, name: str) -> TrainingRecord:
        """Asks it to stop at its next step. Raises TrainingNotFound, TrainingEnded."""

        async def cancel() -> TrainingRecord:
            record = await self.find(name)
            if record.state is State.CANCELLED:
                return record
            if record.state.ended:
                raise TrainingEnded(f"training {record.id} has {record.state.value}")
            await self._runs.cancel(record.id)
            return await self.find(record.id)

        return await self.in_turn(cancel)

    async def pause(self, name: str) -> TrainingRecord:
        """Asks it to leave the device at its next step, with a checkpoint; it is paused from now on.

        Raises TrainingNotFound, TrainingEnded.
        """

        async def pause() -> TrainingRecord:
            record = await self.find(name)
            if record.state.ended:
                raise TrainingEnded(f"training {record.id} has {record.state.value}")
            if record.state is not State.PAUSED:
                await self._runs.pause(record.id)
            return await self.find(record.id)

        return await self.in_turn(pause)

    async def resume(self, name: str) -> TrainingRecord:
        """Queues a paused, cancelled or failed training again.

        Raises TrainingNotFound, FailedPrecondition.
        """

        async def resume() -> TrainingRecord:
            record = await self.find(name)
            if record.state not in (State.PAUSED, State.CANCELLED, State.FAILED):
                error = TrainingEnded if record.state.ended else TrainingNotEnded
                raise error(
                    f"training {record.id} is {record.state.value}, neither paused, cancelled nor failed",
                )
            folder = self._log.folder(record.id) / "images"
            if not all((folder / picture.file).is_file() for picture in record.images):
                gone = "are gone (--training-retention): it cannot go on; train anew, with new_version"
                raise FailedPrecondition(f"the pictures of training {record.id} {gone}")
            await asyncio.to_thread(self._store.version, record.adapter, record.version)
            if record.state is State.PAUSED:
                await self._runs.resume(record.id)
                return await self.find(record.id)
            await self._book.do(self._book.requeue, record.id)
            record = await self.find(record.id)
            await self._runs.add(record, came_from)
            return record

        if self.draining:
            raise ServerDraining("the server is going away")
        came_from = origin.current()
        return await self.in_turn(resume)

    async def delete(self, name: str) -> None:
        """Removes its record, events, pictures and samples. Raises TrainingNotFound, TrainingNotEnded."""

        async def delete() -> None:
            record = await self.find(name)
            if not record.state.ended:
                raise TrainingNotEnded(f"training {record.id} is {record.state.value}; cancel it first")
            # The pictures first: whoever is told that it is done, or finds no record, can rely on that.
            await asyncio.to_thread(self._log.remove, record.id)
            await self._book.do(self._book.delete, record.id)
            self._log.ring(record.id)

        await self.in_turn(delete)

    def taken(self, name: str) -> bool:
        """Whether the name is; a training that failed before its first checkpoint leaves it free."""
        versions = self._store.versions_of(name)
        return any(version.checkpoints for version in versions) or self._runs.writes(name, None)

    async def _free_id(self, name: str) -> str:
        while True:
            training = f"{name}-{''.join(secrets.choice(_ID_LETTERS) for _ in range(4))}"
            if await self._book.do(self._book.training, training) is None:
                return training


def _reused(request_id: str) -> RequestIdReused:
    return RequestIdReused("another training had this request_id", name=request_id)


def estimated_seconds(recipe: Recipe, base: BaseInfo, row_seconds: float) -> float:
    """A rough guess of a training's time on an otherwise idle device, pictures that are painted not counted.

    Forward and backward cost about three forwards, four with gradient checkpointing; a row's cost goes with
    its pixels. Pictures of the class are rows too; output preservation adds the same again, and the base's
    own forward.
    """
    forwards = 4 if recipe.gradient_checkpointing else 3
    a_step = recipe.rows * forwards
    if recipe.output_preservation_weight > 0:
        a_step += recipe.train_batch_size
    pixels = recipe.resolution**2 / (base.native_width * base.native_height)
    steps = recipe.max_train_steps * recipe.gradient_accumulation_steps
    return steps * a_step * row_seconds * pixels
