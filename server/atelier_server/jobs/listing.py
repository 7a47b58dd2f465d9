"""Lists of adapters: filters, orders, pages that stay right while adapters come and go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from atelier_server.adapters.records import AdapterVersion, CheckpointRecord
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import CheckpointId
from atelier_server.jobs.last_used import LastUsed

Key = float | int | str


class Order(StrEnum):
    """What a list is sorted by; equal ones by name and version."""

    NAME = "name"
    CREATED = "create_time"
    USED = "last_used_time"
    SIZE = "size_bytes"


class Tier(StrEnum):
    """Where a checkpoint lies, the nearest place."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
    REMOTE = "remote"


@dataclass(frozen=True, slots=True)
class Query:
    """Which adapters, in which order. `tenant` is "" for the default one; no filter is "" or None."""

    tenant: str = ""
    all_versions: bool = False
    name_prefix: str = ""
    tag: str = ""
    base: str = ""
    resident: bool | None = None
    order: Order = Order.NAME
    descending: bool = False
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Listed:
    """A version as a list shows it. Times are seconds since the epoch."""

    version: AdapterVersion
    tiers: Mapping[CheckpointId, Tier]
    last_used: Mapping[CheckpointId, float]
    pinned: frozenset[CheckpointId] = frozenset()
    expire_time: float | None = None
    thumbnail: bytes = b""


# A place in a sorted list: what it is sorted by, then name and version.
Position = tuple[Key, str, int]


class Listing:
    """Reads the store for people. `resident` tells what lies in slots now, `in_host_memory` which contents do
    not have to be read again, `pinned` what keeps its slot.

    What has been deleted is kept for `retention` seconds.
    """

    def __init__(
        self,
        store: AdapterStore,
        last_used: LastUsed,
        resident: Callable[[], frozenset[CheckpointId]],
        *,
        retention: float,
        in_host_memory: Callable[[], frozenset[str]] = frozenset,
        pinned: Callable[[], frozenset[CheckpointId]] = frozenset,
    ) -> None:
        self._store = store
        self._last_used = last_used
        self.resident = resident
        self.retention = retention
        self._in_host_memory = in_host_memory
        self._pinned = pinned

    def page(
        self, query: Query, after: Position | None, size: int, *, thumbnails: bool = False
    ) -> tuple[list[Listed], Position | None]:
        """The next `size` entries, and the place of their last; None instead if no page follows."""
        places = [(self._place(query.order, version), version) for version in self._found(query)]
        places.sort(key=lambda entry: entry[0], reverse=query.descending)
        if after is not None:
            places = [e for e in places if (e[0] < after if query.descending else e[0] > after)]
        shown = places[:size]
        more = shown[-1][0] if len(places) > size else None
        return self.describe([version for _, version in shown], thumbnails=thumbnails), more

    def describe(self, versions: Sequence[AdapterVersion], *, thumbnails: bool = True) -> list[Listed]:
        resident, pinned = self.resident(), self._pinned()
        pictures = self._store.labels.thumbnails([v.thumbnail for v in versions]) if thumbnails else {}
        return [
            Listed(
                version=version,
                tiers={r.id: self._tier(r, resident) for r in version.checkpoints},
                last_used={r.id: used for r in version.checkpoints if (used := self._last_used.of(r.id))},
                pinned=pinned,
                expire_time=None if version.delete_time is None else version.delete_time + self.retention,
                thumbnail=pictures.get(version.thumbnail, b""),
            )
            for version in versions
        ]

    def _found(self, query: Query) -> list[AdapterVersion]:
        versions = [v for v in self._store.versions(query.tenant, deleted=query.deleted) if v.checkpoints]
        if not (query.all_versions or query.tag or query.deleted):
            versions = list({v.meta.name: v for v in versions}.values())
        resident = self.resident()
        return [v for v in versions if _matches(query, v, resident)]

    def _place(self, order: Order, version: AdapterVersion) -> Position:
        key: Key = ""
        if order is Order.CREATED:
            key = version.meta.create_time
        elif order is Order.USED:
            key = max((self._last_used.of(r.id) or 0.0 for r in version.checkpoints), default=0.0)
        elif order is Order.SIZE:
            key = version.size_bytes
        return key, version.meta.name, version.meta.version

    def _tier(self, record: CheckpointRecord, resident: frozenset[CheckpointId]) -> Tier:
        if record.id in resident:
            return Tier.DEVICE
        if record.sha256 in self._in_host_memory():
            return Tier.HOST
        return Tier.DISK if not self._store.remote or self._store.is_here(record) else Tier.REMOTE


def _matches(query: Query, version: AdapterVersion, resident: frozenset[CheckpointId]) -> bool:
    meta = version.meta
    in_slot = not resident.isdisjoint(record.id for record in version.checkpoints)
    return (
        meta.name.rpartition("/")[2].startswith(query.name_prefix)
        and (not query.tag or query.tag in version.tags)
        and (
            query.base in ("", meta.family, meta.base_model)
            or (len(query.base) >= 6 and meta.base_sha256.startswith(query.base))
        )
        and query.resident in (None, in_slot)
    )
