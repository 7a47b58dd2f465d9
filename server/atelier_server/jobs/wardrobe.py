"""Adapters as users see them: the store's versions, the worker's slots, and who uses what."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

from atelier_server.access.tenants import Tenant
from atelier_server.adapters.labels import Expect
from atelier_server.adapters.records import REPORT_FILE, AdapterVersion
from atelier_server.adapters.store import AdapterStore
from atelier_server.adapters.trash import Collected
from atelier_server.core import AdapterRef, AdapterUse, CheckpointId
from atelier_server.errors import AdapterExists, AdapterInUse, AdapterNotFound, AtelierError, WorkerLost
from atelier_server.jobs import thumbnails
from atelier_server.jobs.calls import Calls
from atelier_server.jobs.checkpoints import count_checkpoints
from atelier_server.jobs.generations import Generations
from atelier_server.jobs.last_used import LastUsed
from atelier_server.jobs.listing import Listed, Listing
from atelier_server.jobs.pins import Pins
from atelier_server.jobs.quotas import check_stored, stored_bytes
from atelier_server.jobs.trainings import Trainings
from atelier_server.jobs.uploads import Uploads
from atelier_server.messages import (
    AdapterExported,
    AdapterImported,
    AdaptersUnloaded,
    ExportAdapter,
    ImportAdapter,
    UnloadAdapter,
)
from atelier_server.metrics import Metrics
from atelier_server.report import AdapterReport, ImportTerms, PublishAs

# Checkpoints that a message names, the newest.
_NAMED = 4

_COLLECT_SECONDS = 3600.0
_log = logging.getLogger(__name__)


class Wardrobe:
    """`listing` reads what this room changes."""

    def __init__(
        self,
        store: AdapterStore,
        *,
        calls: Calls,
        generations: Generations,
        trainings: Trainings,
        uploads: Uploads,
        metrics: Metrics,
        listing: Listing,
        last_used: LastUsed,
        pins: Pins,
    ) -> None:
        self._store = store
        self._last_used = last_used
        self._pins = pins
        self._deleting: set[asyncio.Task[float]] = set()
        self._calls = calls
        self._generations = generations
        self._trainings = trainings
        self._metrics = metrics
        self._reserved: Counter[str] = Counter()
        self.uploads = uploads
        self.listing = listing

    # --------------------------------------------------------------------------------------------- read
    async def resolve(self, refs: tuple[AdapterRef, ...]) -> tuple[AdapterUse, ...]:
        """The checkpoints that references mean now. Raises AdapterNotFound."""
        return await asyncio.to_thread(lambda: tuple(self._resolve(ref) for ref in refs))

    def _resolve(self, ref: AdapterRef) -> AdapterUse:
        use = self._pinned(ref) if ref.sha256 else self._store.resolve(ref)
        return replace(use, weights=ref.weights)

    def _pinned(self, ref: AdapterRef) -> AdapterUse:
        """The checkpoint with the hash that the reference names, of whatever version and step."""
        records = [record for v in self._store.versions_of(ref.name) for record in v.checkpoints]
        for record in records:
            if record.sha256 == ref.sha256:
                return AdapterUse(record.id, ref.weight, record.path, record.sha256)
        name = ref.name.rpartition("/")[2]  # as its tenant names it
        there = ", ".join(
            f"{name}@{r.id.step} of v{r.id.version} has {r.sha256[:12]}" for r in records[-_NAMED:]
        )
        raise AdapterNotFound(
            f"no checkpoint of {name!r} has the sha256 {ref.sha256[:12]}...; {there or 'there is none'}",
            name=ref.name,
        )

    async def use(self, refs: tuple[AdapterRef, ...]) -> tuple[AdapterUse, ...]:
        """What `resolve` finds, for a generation: fetched where the store is remote, and noted as used."""
        uses = await self.resolve(refs)

        def prepare() -> None:
            self._last_used.touch(use.checkpoint for use in uses)
            if self._store.remote:
                for use in uses:
                    self._store.fetch(use)

        if uses:
            await asyncio.to_thread(prepare)
        return uses

    async def show(self, ref: AdapterRef) -> Listed:
        """The version that a reference means. Raises AdapterNotFound."""

        def show() -> Listed:
            found = self._store.find(ref).id
            return self.listing.describe([self._store.version(found.name, found.version)])[0]

        return await asyncio.to_thread(show)

    # ------------------------------------------------------------------------------------------- labels
    async def tag(
        self, ref: AdapterRef, tag: str, expected: CheckpointId | Expect
    ) -> tuple[Listed, CheckpointId | None]:
        """Puts a tag on a checkpoint; what it was on. Raises AdapterNotFound, TagMoved."""
        record = await asyncio.to_thread(self._store.find, ref)
        was = await asyncio.to_thread(self._store.labels.tag, ref.name, tag, record.id, expected)
        return await self.show(AdapterRef(ref.name, f"v{record.id.version}")), was

    async def untag(self, name: str, tag: str, expected: CheckpointId | Expect) -> CheckpointId | None:
        """Takes a tag away; what it was on. Raises AdapterNotFound, TagMoved."""
        await asyncio.to_thread(self._store.version, name)
        return await asyncio.to_thread(self._store.labels.tag, name, tag, None, expected)

    async def annotate(self, ref: AdapterRef, note: str) -> Listed:
        """Writes a note on the version that a reference means. Raises AdapterNotFound."""
        record = await asyncio.to_thread(self._store.find, ref)
        await asyncio.to_thread(self._store.labels.note, ref.name, record.id.version, note)
        return await self.show(AdapterRef(ref.name, f"v{record.id.version}"))

    async def report(self, version: AdapterVersion) -> AdapterReport | None:
        """What the import of a version understood; None for one that was not imported."""
        record = version.recommended
        if record is None or REPORT_FILE not in record.files:
            return None
        path = await asyncio.to_thread(self._store.file, record.id, REPORT_FILE)
        return AdapterReport.of(json.loads(await asyncio.to_thread(path.read_text, encoding="utf-8")))

    # -------------------------------------------------------------------------------------------- slots
    async def load(self, ref: AdapterRef, *, pin: bool) -> tuple[CheckpointId, bool]:
        """Puts a checkpoint into a slot; False if it was there already. `pin`: it stays until it is unloaded.

        Raises AdapterNotFound, TooManyPins.
        """
        (use,) = await self.resolve((ref,))
        answer = await self._pins.load(use, pin=pin)
        return use.checkpoint, answer.loaded

    async def unload(self, ref: AdapterRef) -> int:
        """Frees the slots of a checkpoint, or of all of an adapter's; returns how many."""
        if ref.selector:
            checkpoints = tuple(use.checkpoint for use in await self.resolve((ref,)))
        else:
            checkpoints = await asyncio.to_thread(self._checkpoints, ref.name, None)
            if not checkpoints:
                raise AdapterNotFound(f"there is no adapter {ref.name!r}", name=ref.name)
        self._pins.release(checkpoints)
        answer = await self._calls.call(lambda call: UnloadAdapter(call, checkpoints), AdaptersUnloaded)
        return answer.unloaded

    async def delete(self, name: str, version: int | None) -> float:
        """Hides an adapter or one version of it; until when it can be undeleted (seconds since the epoch).

        Raises AdapterNotFound, AdapterInUse. Goes on to its end also where its caller has gone.
        """
        task = asyncio.create_task(self._delete(name, version), name="delete")
        self._deleting.add(task)
        task.add_done_callback(self._deleting.discard)
        return await asyncio.shield(task)

    async def _delete(self, name: str, version: int | None) -> float:
        async def delete() -> tuple[CheckpointId, ...]:
            if self._trainings.writes(name, version):
                raise AdapterInUse(f"a training is writing {name!r}")
            if self._generations.uses(name, version):
                raise AdapterInUse(f"a generation that has not finished uses {name!r}")
            checkpoints = await asyncio.to_thread(self._checkpoints, name, version)
            await asyncio.to_thread(self._store.delete, name, version)
            return checkpoints

        # In turn with trainings: none may begin to write what is being deleted.
        checkpoints = await self._trainings.in_turn(delete)
        self._pins.release(checkpoints)
        self._metrics.stored_changed(-len(checkpoints))
        if checkpoints and self._calls.ready:
            # A later adapter may get the same name, version and step: no slot may still hold the old one.
            with suppress(WorkerLost):  # its slots die with it
                await self._calls.call(lambda call: UnloadAdapter(call, checkpoints), AdaptersUnloaded)
        return time.time() + self.listing.retention

    async def undelete(self, name: str, version: int | None) -> list[Listed]:
        """Brings back what has been deleted and is kept. Raises AdapterNotFound."""

        def undelete() -> list[Listed]:
            self._store.trash.undelete(name, version)
            back = [v for v in self._store.versions_of(name) if version in (None, v.meta.version)]
            return self.listing.describe([v for v in back if v.checkpoints])

        found = await asyncio.to_thread(undelete)
        await self._count()
        return found

    async def collect(self) -> Collected:
        """Removes for good what was deleted long ago and is not in use, and files that nothing names."""
        deleted = await asyncio.to_thread(lambda: self._store.versions(deleted=True))
        resident = self.listing.resident()
        busy = {
            (v.meta.name, v.meta.version)
            for v in deleted
            if self._generations.uses(v.meta.name, v.meta.version)
            or self._trainings.writes(v.meta.name, v.meta.version)
            or not resident.isdisjoint(record.id for record in v.checkpoints)
        }

        def collect() -> Collected:
            done = self._store.trash.collect(self.listing.retention, lambda *version: version in busy)
            self._last_used.keep(record.id for v in self._store.versions() for record in v.checkpoints)
            return done

        return await asyncio.to_thread(collect)

    async def keep_house(self) -> None:
        """Collects and counts now and every hour, for as long as the server lives."""
        while True:
            try:
                await asyncio.to_thread(self.uploads.partial.expire)
                done = await self.collect()
                await self._count()
                if done.versions or done.files:
                    _log.info("removed %d deleted versions and %d files", len(done.versions), done.files)
            except (AtelierError, OSError) as error:
                _log.warning("nothing was collected: %s", error)
            except Exception:
                _log.exception("nothing was collected")
            await asyncio.sleep(_COLLECT_SECONDS)

    # -------------------------------------------------------------------------------------------- files
    @asynccontextmanager
    async def space(self, tenant: Tenant, size_bytes: int) -> AsyncIterator[None]:
        """Sets bytes of a tenant's quota aside for a file that is being imported. Raises QuotaExceeded."""
        if tenant.quotas.max_stored_bytes is None:
            yield
            return
        held = await asyncio.to_thread(stored_bytes, self._store, tenant.scope)
        check_stored(tenant, held + self._reserved[tenant.name], size_bytes)
        self._reserved[tenant.name] += size_bytes
        try:
            yield
        finally:
            self._reserved[tenant.name] -= size_bytes

    async def check_name(self, name: str, *, new_version: bool) -> None:
        """Refuses an import early. Raises AdapterExists."""
        if not new_version and await asyncio.to_thread(self._taken, name):
            raise AdapterExists(f"adapter {name!r} exists; set new_version to add one", name=name)

    def _taken(self, name: str) -> bool:
        """A damaged adapter is not in the way of its own content, which heals it; the store will tell."""
        with suppress(AdapterNotFound):
            if self._store.version(name).damaged:
                return False
        return self._trainings.taken(name)

    async def adopt(
        self, path: Path, name: str, *, new_version: bool, terms: ImportTerms
    ) -> tuple[Listed, AdapterImported]:
        """Has the worker check an adapter's file or folder and publish it as a new version."""
        target = await self.target(PublishAs(name, new_version, terms.trigger))
        answer = await self._calls.call(
            lambda call: ImportAdapter(call, str(path), name, target.new_version, terms), AdapterImported
        )
        picture = await asyncio.to_thread(thumbnails.embedded, path)
        await asyncio.to_thread(thumbnails.keep, self._store, answer.checkpoint, picture)
        return await self.published(answer.checkpoint), answer

    async def target(self, target: PublishAs) -> PublishAs:
        """Whether the name can be had now; the store decides when all is there. Raises AdapterExists."""
        await self.check_name(target.name, new_version=target.new_version)
        return target

    async def published(self, checkpoint: CheckpointId) -> Listed:
        """The version of a checkpoint that the worker has just published."""
        self._metrics.stored_changed(1)
        return await self.show(AdapterRef(checkpoint.name, f"v{checkpoint.version}"))

    @asynccontextmanager
    async def exported(
        self, ref: AdapterRef, layout: str
    ) -> AsyncIterator[tuple[CheckpointId, AdapterExported]]:
        """A temporary file of a checkpoint in `layout`. Raises AdapterNotFound, DataLoss."""
        (use,) = await self.resolve((ref,))
        await asyncio.to_thread(self._store.fetch, use)
        path = self.uploads.file()
        try:
            answer = await self._calls.call(
                lambda call: ExportAdapter(call, use, layout, str(path)), AdapterExported
            )
            yield use.checkpoint, answer
        finally:
            path.unlink(missing_ok=True)

    async def _count(self) -> None:
        self._metrics.stored_checkpoints(await asyncio.to_thread(count_checkpoints, self._store))

    def _checkpoints(self, name: str, version: int | None) -> tuple[CheckpointId, ...]:
        return tuple(
            record.id
            for found in self._store.versions_of(name)
            if version in (None, found.meta.version)
            for record in found.checkpoints
        )
