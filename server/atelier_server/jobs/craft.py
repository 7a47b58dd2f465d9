"""New adapters out of others or out of tuned bases, and two of them compared. The worker does the sums."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from atelier_server.access.tenants import Tenant
from atelier_server.core import AdapterRef, AdapterUse
from atelier_server.jobs.calls import Calls
from atelier_server.jobs.listing import Listed
from atelier_server.jobs.wardrobe import Wardrobe
from atelier_server.messages import (
    AdapterMade,
    AdaptersDiffed,
    DiffAdapters,
    ExtractAdapter,
    MergeAdapters,
)
from atelier_server.report import AdapterComparison, PublishAs


class Craft:
    def __init__(self, wardrobe: Wardrobe, calls: Calls) -> None:
        self._wardrobe = wardrobe
        self._calls = calls

    async def merge(
        self, tenant: Tenant, refs: tuple[AdapterRef, ...], target: PublishAs, rank: int | None
    ) -> tuple[Listed, float]:
        """The new version, and the share of the change that it keeps."""
        uses = await self._wardrobe.resolve(refs)
        sizes = [await self._size(use) for use in uses]
        async with self._wardrobe.space(tenant, sum(sizes)):
            target = await self._wardrobe.target(target)
            answer = await self._calls.call(lambda call: MergeAdapters(call, uses, rank, target), AdapterMade)
        return await self._wardrobe.published(answer.checkpoint), answer.kept

    async def extract(
        self, tenant: Tenant, tuned: str, base: str, target: PublishAs, rank: int
    ) -> AsyncGenerator[tuple[int, int] | tuple[Listed, float], None]:
        """(layers done, of all) as it goes on, at last the new version and what it keeps of it all."""
        told: asyncio.Queue[tuple[int, int] | None] = asyncio.Queue()
        async with self._wardrobe.space(tenant, 0):
            target = await self._wardrobe.target(target)
            task = asyncio.create_task(
                self._calls.call(
                    lambda call: ExtractAdapter(
                        call, tuned, base, rank, target, public=bool(tenant.scope.tenant)
                    ),
                    AdapterMade,
                    lambda done, total: told.put_nowait((done, total)),
                )
            )
            task.add_done_callback(lambda _: told.put_nowait(None))
            try:
                while (progress := await told.get()) is not None:
                    yield progress
                answer = await task
            finally:
                task.cancel()
        yield await self._wardrobe.published(answer.checkpoint), answer.kept

    async def diff(self, a: AdapterRef, b: AdapterRef) -> tuple[AdapterUse, AdapterUse, AdapterComparison]:
        first, second = await self._wardrobe.resolve((a, b))
        answer = await self._calls.call(lambda call: DiffAdapters(call, first, second), AdaptersDiffed)
        return first, second, answer.comparison

    async def _size(self, use: AdapterUse) -> int:
        checkpoint = use.checkpoint
        listed = await self._wardrobe.show(AdapterRef(checkpoint.name, f"v{checkpoint.version}"))
        return sum(r.size_bytes for r in listed.version.checkpoints if r.id == checkpoint)
