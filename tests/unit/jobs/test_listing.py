"""Lists: filters, orders, and pages that stay right while adapters come and go."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from atelier_server.adapters.labels import Expect
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import CheckpointId
from atelier_server.jobs.last_used import LastUsed
from atelier_server.jobs.listing import Listing, Order, Position, Query, Tier


class Shop:
    """A store, its listing, and what is said to lie in slots."""

    def __init__(self, root: Path) -> None:
        self.store = AdapterStore(root / "adapters")
        self.last_used = LastUsed(root / "last-used.json")
        self.resident: frozenset[CheckpointId] = frozenset()
        self.listing = Listing(self.store, self.last_used, lambda: self.resident, retention=100.0)

    def adopt(
        self, name: str, size: int = 1, family: str = "sd1", *, new_version: bool = False
    ) -> CheckpointId:
        record = self.store.publish_version(
            lambda folder: (folder / ADAPTER_FILE).write_bytes(f"{name}".encode().ljust(size)) and None,
            name=name,
            trigger="",
            base_model="pocket",
            base_sha256="00ffee11",
            new_version=new_version,
            rank=4,
            lora_alpha=4.0,
            family=family,
        )
        return record.id

    def names(self, query: Query) -> list[str]:
        found, more = self.listing.page(query, None, 1000)
        assert more is None
        return [f"{listed.version.meta.name}@v{listed.version.meta.version}" for listed in found]

    def paged(self, query: Query, size: int) -> list[str]:
        names, after = [], None
        while True:
            found, after = self.listing.page(query, after, size)
            names += [listed.version.meta.name for listed in found]
            if after is None:
                return names


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def test_filters(shop: Shop) -> None:
    otto = shop.adopt("otto")
    shop.adopt("otto", 5, new_version=True)
    shop.adopt("otter", family="sdxl")
    shop.adopt("acme/otto")
    shop.store.labels.tag("otto", "best", otto, Expect.ANYTHING)
    shop.resident = frozenset([CheckpointId("otto", 2, 0)])
    assert shop.names(Query()) == ["otter@v1", "otto@v2"]
    assert shop.names(Query(all_versions=True)) == ["otter@v1", "otto@v1", "otto@v2"]
    assert shop.names(Query(tenant="acme", name_prefix="ott")) == ["acme/otto@v1"]
    assert shop.names(Query(name_prefix="otte")) == ["otter@v1"]
    assert shop.names(Query(name_prefix="acme")) == []
    assert shop.names(Query(tag="best")) == ["otto@v1"]  # also where a newer version is there
    assert shop.names(Query(tag="v1")) == ["otter@v1", "otto@v1"]
    assert shop.names(Query(base="sdxl")) == ["otter@v1"]
    assert shop.names(Query(base="pocket")) == shop.names(Query(base="00ffee")) == ["otter@v1", "otto@v2"]
    assert shop.names(Query(base="00ff")) == []  # too short to mean a digest
    assert shop.names(Query(resident=True)) == ["otto@v2"]
    assert shop.names(Query(resident=False)) == ["otter@v1"]
    shop.store.delete("otter")
    assert shop.names(Query(deleted=True)) == ["otter@v1"]
    (deleted,), _ = shop.listing.page(Query(deleted=True), None, 10)
    assert deleted.version.delete_time is not None
    assert deleted.expire_time == deleted.version.delete_time + 100


def test_orders_and_what_is_shown(shop: Shop) -> None:
    ids = [shop.adopt(name, size) for name, size in (("b", 10), ("a", 30), ("c", 20))]
    shop.last_used.touch([ids[2]])
    shop.last_used.touch([ids[0]])

    def order(by: Order, *, descending: bool = False) -> str:
        return "".join(name[0] for name in shop.names(Query(order=by, descending=descending)))

    assert (order(Order.NAME), order(Order.NAME, descending=True)) == ("abc", "cba")
    assert (order(Order.SIZE), order(Order.SIZE, descending=True)) == ("bca", "acb")
    assert (order(Order.CREATED), order(Order.CREATED, descending=True)) == ("bac", "cab")
    assert (order(Order.USED), order(Order.USED, descending=True)) == ("acb", "bca")
    shop.resident = frozenset([ids[0]])
    shop.store.labels.set_thumbnail(ids[1], b"picture")
    in_memory = {shop.store.versions()[2].checkpoints[0].sha256}
    shop.listing._in_host_memory = lambda: frozenset(in_memory)
    found, _ = shop.listing.page(Query(), None, 10, thumbnails=True)
    assert [listed.thumbnail for listed in found] == [b"picture", b"", b""]
    assert [next(iter(listed.tiers.values())) for listed in found] == [Tier.DISK, Tier.DEVICE, Tier.HOST]
    assert [bool(listed.last_used) for listed in found] == [False, True, True]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["add", "delete"]), st.integers(0, 30)), max_size=8
    ),
    order=st.sampled_from([Order.NAME, Order.CREATED, Order.SIZE]),
    descending=st.booleans(),
    size=st.integers(1, 4),
)
def test_pages_under_changes(
    tmp_path_factory: pytest.TempPathFactory,
    changes: list[tuple[int, str, int]],
    order: Order,
    descending: bool,
    size: int,
) -> None:
    """What stays from the first page to the last is on one page exactly, whatever comes and goes."""
    shop = Shop(tmp_path_factory.mktemp("shop"))
    for number in range(0, 31, 3):
        shop.adopt(f"n{number}", 10 + number * 7 % 13)
    query = Query(order=order, descending=descending)
    there = set(shop.paged(query, 100))
    stays = set(there)
    seen: list[str] = []
    after: Position | None = None
    page = 0
    while True:
        found, after = shop.listing.page(query, after, size)
        seen += [listed.version.meta.name for listed in found]
        if after is None:
            break
        for _, what, number in [change for change in changes if change[0] == page]:
            name = f"n{number}"
            if what == "delete" and name in there:
                shop.store.delete(name)
                there.discard(name)
                stays.discard(name)
            elif what == "add" and name not in there:
                shop.adopt(name, 10 + number * 7 % 13)
                there.add(name)
        page += 1
    assert len(seen) == len(set(seen)) or {n for n in seen if seen.count(n) > 1}.isdisjoint(stays)
    assert stays <= set(seen)


def test_last_used_is_kept_and_a_broken_file_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "last-used.json"
    used = LastUsed(path)
    first, second = CheckpointId("otto", 1, 5), CheckpointId("anna", 1, 5)
    used.touch([first, second])
    used.write()
    again = LastUsed(path)
    assert again.of(first) == used.of(first) is not None
    again.keep([first])
    assert LastUsed(path).of(second) is None
    for text in ("{", "[]", '{"otto@v1@5": "x"}'):
        path.write_text(text)
        assert LastUsed(path).of(first) is None
