"""What is deleted is hidden, comes back, or goes for good; and nothing else ever goes."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from atelier_server.adapters.labels import Expect
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterExists, AdapterNotFound
from tests.unit.adapters.places import Place, adopt, create, keys, publish


def test_delete_hides_and_undelete_brings_back(place: Place, store: AdapterStore) -> None:
    other = place.open("two")
    create(store)
    publish(store, 50)
    adopt(store, content=b"two", new_version=True)
    adopt(store, "anna", b"anna")
    store.labels.tag("otto", "best", CheckpointId("otto", 1, 50), Expect.ANYTHING)
    before = store.versions()
    store.delete("otto", 2)
    assert [v.meta.version for v in other.versions() if v.meta.name == "otto"] == [1]
    store.delete("otto")
    for handle in (store, other):
        assert [v.meta.name for v in handle.versions()] == ["anna"]
        deleted = handle.versions(deleted=True)
        assert [(v.meta.name, v.meta.version) for v in deleted] == [("otto", 1), ("otto", 2)]
        assert all(time.time() - 100 < (v.delete_time or 0) <= time.time() for v in deleted)
        with pytest.raises(AdapterNotFound):
            handle.resolve(AdapterRef("otto", "best"))
    for version in (None, 1):
        with pytest.raises(AdapterNotFound):
            store.delete("otto", version)
    other.trash.undelete("otto", None)
    assert store.versions() == before
    with pytest.raises(AdapterNotFound):
        store.trash.undelete("otto", None)
    with pytest.raises(AdapterNotFound):
        store.trash.undelete("nobody", None)


def test_a_deleted_name_is_free_and_its_numbers_are_not(store: AdapterStore) -> None:
    adopt(store)
    store.delete("otto")
    assert adopt(store, content=b"new").id.version == 2
    with pytest.raises(AdapterExists):
        adopt(store, content=b"newer")
    store.trash.undelete("otto", 1)
    assert [v.meta.version for v in store.versions()] == [1, 2]
    store.delete("otto")
    assert len(store.trash.collect(0).versions) == 2
    assert adopt(store).id.version == 3


def test_collect_removes_what_was_deleted_long_ago(place: Place) -> None:
    store, other = place.open("one", grace=0), place.open("two", grace=0)
    _publish_old(store)
    store.labels.note("otto", 1, "a note")
    store.labels.set_thumbnail(CheckpointId("otto", 1, 50), b"picture")
    store.delete("otto")
    assert other.trash.collect(3600).versions == ()
    store.trash.undelete("otto", None)
    assert other.trash.collect(0) == other.trash.collect(0)
    assert other.fetch(other.resolve(AdapterRef("otto"))).read_bytes() == b"weights"
    store.delete("otto")
    busy = other.trash.collect(0, lambda name, version: (name, version) == ("otto", 1))
    assert busy.versions == ()
    done = other.trash.collect(0)
    assert (done.versions, done.files) == ((("otto", 1),), 2)
    assert not [key for key in keys(store) if "/deleted/" not in key]
    with pytest.raises(AdapterNotFound):
        store.trash.undelete("otto", None)
    assert store.versions(deleted=True) == []


def _publish_old(store: AdapterStore) -> None:
    """Published when a manifest might still name its files: `grace` 0 is for what comes after."""
    store._blobs._grace = 3600
    create(store)
    publish(store, 50)
    store._blobs._grace = 0


def test_files_that_others_share_stay(place: Place) -> None:
    store = place.open(grace=0)
    _publish_old(store)
    store._blobs._grace = 3600
    adopt(store, "anna", b"weights")
    store._blobs._grace = 0
    store.delete("otto")
    done = store.trash.collect(0)
    assert done.files == 1  # training-state.json
    assert store.fetch(store.resolve(AdapterRef("anna"))).read_bytes() == b"weights"


def test_what_is_being_published_elsewhere_is_not_freed(place: Place) -> None:
    publisher, collector = place.open("one"), place.open("two")

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(b"weights")

    create(publisher)
    with publisher._written(write) as files:  # the files are there, the manifest is not
        assert collector.trash.collect(0).files == 0
        assert keys(publisher, "blobs") == {f"blobs/{file.blob}" for file in files.values()}
    # Nobody came to name them: when they are old enough, they go.
    assert place.open("three", grace=0).trash.collect(0).files == 1


def test_a_collector_that_slept_takes_nothing_that_was_published_since(place: Place) -> None:
    store, sleeper = place.open("one"), place.open("two")
    create(store)
    with store._written(lambda folder: (folder / ADAPTER_FILE).write_bytes(b"weights") and None) as files:
        key = f"blobs/{files[ADAPTER_FILE].blob}"
    old = f"{key.rpartition('-')[0]}-{1:016x}"  # nobody named it, and that was long ago
    store._objects.move(key, old)
    listing = sleeper._blobs.listing()
    publish(store, 50)  # the same content, while the collector sleeps
    assert sleeper._blobs.free(listing, []) == 1
    assert old not in keys(store)
    other = place.open("three")
    assert other.fetch(other.resolve(AdapterRef("otto"))).read_bytes() == b"weights"


def test_a_damaged_manifest_keeps_every_file(place: Place) -> None:
    store = place.open(grace=0)
    _publish_old(store)
    store._objects.remove("names/otto/v1/000050.json")
    store._objects.create("names/otto/v1/000050.json", b"{")
    assert store.trash.collect(0).files == 0
    assert len(keys(store, "blobs")) == 2


def test_a_collection_cut_short_goes_on(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.open(grace=0)
    _publish_old(store)
    store.delete("otto")
    with monkeypatch.context() as patch:

        def die(key: str) -> None:
            raise KeyboardInterrupt

        patch.setattr(store._objects, "remove", die)
        with pytest.raises(KeyboardInterrupt):
            store.trash.collect(0)
    assert store.versions() == store.versions(deleted=True) == []
    store.trash.collect(0)
    assert not [key for key in keys(store) if "/deleted/" not in key]


def test_a_checkpoint_is_removed_and_its_files_are_freed(place: Place) -> None:
    store, other = place.open("one"), place.open("two")
    create(store)
    for step in (50, 100):
        _publish_with_state(store, step)
    store.remove_checkpoint(CheckpointId("otto", 1, 50))
    for handle in (store, other):
        assert [record.id.step for record in handle.version("otto").checkpoints] == [100]
        with pytest.raises(AdapterNotFound):
            handle.resolve(AdapterRef("otto", "50"))
        with pytest.raises(ValueError, match="last"):
            handle.remove_checkpoint(CheckpointId("otto", 1, 100))
    store._blobs._grace = 0
    store.trash.collect(0)
    assert len(keys(store, "blobs")) == 2
    assert other.fetch(other.resolve(AdapterRef("otto"))).read_bytes() == b"weights 100"


def test_only_the_newest_checkpoint_keeps_what_a_training_goes_on_from(place: Place) -> None:
    store = place.open()
    create(store)
    for step in (50, 100):
        _publish_with_state(store, step)
    store._blobs._grace = 0
    size = len(b"weights 50") + len(b"weights 100") + len(b"state 100")
    assert store.version("otto").size_bytes == size
    assert store.trash.collect(0).files == 1
    newest = CheckpointId("otto", 1, 100)
    assert store.file(newest, "training-state.bin").read_bytes() == b"state 100"
    for step in (50, 100):
        use = store.resolve(AdapterRef("otto", str(step)))
        assert store.fetch(use).read_bytes() == b"weights %d" % step
    assert not any(version.damaged for version in store.versions())


def test_what_only_a_training_needs_is_freed_at_once_and_never_its_twins(place: Place) -> None:
    """Two trainings of one recipe have the same state, to the bit; what one frees is not the other's."""
    store = place.open()
    for name in ("otto", "twin"):
        create(store, name)
        for step in (50, 100):
            _publish_with_state(store, step, name)
    before = len(keys(store, "blobs"))
    with pytest.raises(ValueError, match="last"):
        store.forget_state(CheckpointId("otto", 1, 100))
    for _ in range(2):
        store.forget_state(CheckpointId("otto", 1, 50))
    assert len(keys(store, "blobs")) == before - 1
    for handle in (store, place.open("two")):
        for name, step in (("otto", 100), ("twin", 50), ("twin", 100)):
            found = handle.file(CheckpointId(name, 1, step), "training-state.bin")
            assert found.read_bytes() == b"state %d" % step
        assert handle.fetch(handle.resolve(AdapterRef("otto", "50"))).read_bytes() == b"weights 50"
        assert not any(version.damaged for version in handle.versions())


def _publish_with_state(store: AdapterStore, step: int, name: str = "otto") -> None:
    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(b"weights %d" % step)
        (folder / "training-state.bin").write_bytes(b"state %d" % step)

    store.publish(CheckpointId(name, 1, step), write, loss=0.5, rank=4, lora_alpha=4.0)
