"""Adapters into slots and out of them, as the loop and its callers ask for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from time import monotonic

from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.engine.residency import Residency
from atelier_server.engine.runner import Runner
from atelier_server.messages import Event, Sample

_log = logging.getLogger(__name__)


class Loading:
    """`in_use` tells what pictures on the desk need; that is never unloaded."""

    def __init__(
        self,
        residency: Residency,
        *,
        runner: Runner,
        send: Callable[[Event], None],
        in_use: Callable[[], frozenset[CheckpointId]],
    ) -> None:
        self._residency = residency
        self._runner = runner
        self._send = send
        self._in_use = in_use
        self._doomed: set[CheckpointId] = set()

    def announce(self, uses: Iterable[AdapterUse]) -> None:
        """These will be needed soon: what has no slot is brought nearer."""
        for use in uses:
            hit = self._residency.slot(use.checkpoint) is not None
            self._send(Sample("adapter_lookups_total", 1.0, ("hit" if hit else "miss",)))
            if not hit:
                self._runner.prefetch(use)

    def load(self, use: AdapterUse, pinned: frozenset[CheckpointId]) -> int:
        """The slot of an adapter, loaded now if it was in none. `pinned` ones are not evicted for it.

        Raises what loading raises, with the slot empty.
        """
        evictions = self._residency.evictions
        slot, needs_load = self._residency.acquire(use.checkpoint, pinned)
        if needs_load:
            before = monotonic()
            try:
                source = self._runner.load(use, slot)
            except Exception:
                self._residency.release([use.checkpoint])
                self._runner.clear(slot)
                raise
            seconds = monotonic() - before
            self._send(Sample("adapter_load_seconds", seconds, (source,)))
            told: Mapping[str, object] = {"source": source, "seconds": round(seconds, 4)}
            _log.info("adapter loaded", extra={"adapter": str(use.checkpoint), **told})
        if evicted := self._residency.evictions - evictions:
            self._send(Sample("adapter_evictions_total", float(evicted)))
        return slot

    def ensure(self, use: AdapterUse, *, pin: bool = False) -> bool:
        """Loads an adapter ahead of its first picture; whether it was in no slot before. `pin`: it stays."""
        resident = self._residency.slot(use.checkpoint) is not None
        pinned = self._in_use()
        # With every slot in use one is taken all the same: its pictures get theirs back before they step.
        self.load(use, pinned if self._residency.has_room(pinned) else frozenset())
        self._doomed.discard(use.checkpoint)
        if pin:
            self._residency.pin(use.checkpoint)
        return not resident

    def unload(self, checkpoints: tuple[CheckpointId, ...]) -> int:
        """Frees what nobody uses now, and marks the rest to be freed when its last picture is done."""
        self._residency.unpin(checkpoints)
        resident = {c for c in checkpoints if self._residency.slot(c) is not None}
        self._doomed |= resident
        self.retire()
        return len(resident)

    def retire(self) -> None:
        """Frees what is to be unloaded and no longer in use."""
        idle = self._doomed - self._in_use() if self._doomed else frozenset()
        for slot in self._residency.release(idle):
            self._runner.clear(slot)
        self._doomed -= idle
