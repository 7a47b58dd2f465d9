"""The store, in a folder and in an S3 bucket: atomic, immutable, shared by processes, deaf to paths."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterExists, AdapterNotFound, DataLoss, InvalidRequest, StorageFull
from tests.unit.adapters.places import Place, adopt, create, keys, lose, publish, rot


def test_what_is_published_is_found(place: Place, store: AdapterStore) -> None:
    meta = create(store)
    assert (meta.name, meta.version, meta.trigger, meta.owner) == ("otto", 1, "a sks octopus", "one")
    assert store.version("otto", 1).checkpoints == ()
    assert store.last_checkpoint("otto", 1) is None
    publish(store, 100)
    publish(store, 1_000_000, content=b"later")
    publish(store, 750)
    (found,) = place.open("two").versions()
    assert (found.meta, found.meta.recipe) == (meta, {"rank": 8})
    assert found.tags == ("v1",)
    assert [record.id.step for record in found.checkpoints] == [100, 750, 1_000_000]
    last = store.last_checkpoint("otto", 1)
    assert last is not None
    assert found.recommended is not None
    assert (last.id, last.sha256) == (found.recommended.id, found.recommended.sha256)
    assert (last.size_bytes, last.loss, last.rank, last.lora_alpha) == (5, 0.25, 8, 4.0)
    assert Path(last.path).read_bytes() == b"later"  # also of a remote store: it was published here
    store.verify(last)


def test_a_version_with_its_checkpoint_appears_at_once(place: Place, store: AdapterStore) -> None:
    record = adopt(store)
    assert record.id == CheckpointId("otto", 1, 0)
    with pytest.raises(AdapterExists):
        adopt(store, content=b"other")
    assert adopt(store, content=b"other", new_version=True).id.version == 2
    found = place.open("two").versions()
    assert [(v.meta.version, [r.id.step for r in v.checkpoints]) for v in found] == [(1, [0]), (2, [0])]
    assert len([key for key in keys(store) if key.startswith("names/")]) == 2


def test_references_mean_what_the_contract_says(store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    publish(store, 200)
    assert create(store, new_version=True).version == 2

    def step(selector: str) -> tuple[int, int]:
        use = store.resolve(AdapterRef("otto", selector, 0.5))
        assert use.weight == 0.5
        return use.checkpoint.version, use.checkpoint.step

    assert step("") == (1, 200)  # version 2 has nothing yet
    publish(store, 50, version=2)
    assert step("") == (2, 50)
    assert step("50") == (2, 50)
    assert step("v1") == (1, 200)
    for selector in ("100", "v3", "best", "v0", "../v1"):
        with pytest.raises(AdapterNotFound):
            step(selector)


def test_a_taken_name_needs_new_version(store: AdapterStore) -> None:
    create(store)
    with pytest.raises(AdapterExists):
        create(store)
    assert [create(store, new_version=True).version for _ in range(3)] == [2, 3, 4]


@pytest.mark.parametrize(
    "name",
    ["../x", "a/b/c", "A/b", "a/", "/etc", "", ".", "@a/b", "Otto", "o\n", "o\0", "x" * 64, ".staging"],
)
def test_a_name_that_is_none_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    store = AdapterStore(tmp_path / "adapters")
    for refused in (create, adopt):
        with pytest.raises(InvalidRequest):
            refused(store, name)
    for call in (store.version, store.delete, lambda n: store.resolve(AdapterRef(n))):
        with pytest.raises(AdapterNotFound):
            call(name)
    assert store.last_checkpoint(name, 1) is None
    assert not (tmp_path / "adapters").exists()


def test_tenants_have_names_of_their_own(store: AdapterStore) -> None:
    for name in ("otto", "acme/otto", "zoo/otto", "acme/anna", "acme/tags", "acme/v1"):
        adopt(store, name, name.encode())
        with pytest.raises(AdapterExists):
            adopt(store, name)

    assert [v.meta.name for v in store.versions_of("acme/otto")] == ["acme/otto"]
    assert store.versions_of("nobody") == store.versions_of("../x") == []

    def names(tenant: str | None) -> list[str]:
        return [v.meta.name for v in store.versions(tenant)]

    assert names(None) == ["acme/anna", "acme/otto", "acme/tags", "acme/v1", "otto", "zoo/otto"]
    assert (names(""), names("zoo"), names("nobody")) == (["otto"], ["zoo/otto"], [])
    assert names("acme") == ["acme/anna", "acme/otto", "acme/tags", "acme/v1"]
    for name in ("otto", "acme/otto", "acme/v1"):
        assert store.fetch(store.resolve(AdapterRef(name))).read_bytes() == name.encode()
    store.delete("acme/otto")
    assert store.resolve(AdapterRef("otto")).checkpoint.name == "otto"
    assert "acme/otto" not in names("acme")


def test_a_published_step_is_immutable(place: Place, store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    before, files = store.last_checkpoint("otto", 1), keys(store, "names")
    publish(place.open("two"), 100)  # the same weights once more: nothing happens
    with pytest.raises(AdapterExists):
        publish(place.open("two"), 100, content=b"other")
    assert store.last_checkpoint("otto", 1) == before
    assert keys(store, "names") == files


def test_the_same_content_is_stored_once(store: AdapterStore) -> None:
    for name in ("otto", "anna", "bolt"):
        adopt(store, name)
    assert len(keys(store, "blobs")) == 1


def test_a_failing_write_leaves_nothing(store: AdapterStore) -> None:
    create(store)
    before = keys(store)

    def fail(error: Exception) -> None:
        def write(folder: Path) -> None:
            (folder / ADAPTER_FILE).write_bytes(b"half")
            raise error

        store.publish(CheckpointId("otto", 1, 5), write, loss=None, rank=1, lora_alpha=1)

    with pytest.raises(StorageFull):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(PermissionError):
        fail(PermissionError("no"))
    with pytest.raises(ZeroDivisionError):
        fail(ZeroDivisionError())
    with pytest.raises(FileNotFoundError):
        store.publish(CheckpointId("otto", 1, 5), lambda _: None, loss=None, rank=1, lora_alpha=1)
    with pytest.raises(ValueError, match="nan"):
        store.publish(CheckpointId("otto", 1, 5), lambda _: None, loss=float("nan"), rank=1, lora_alpha=1)
    assert keys(store) == before
    assert list(store._staging._area.iterdir()) == []
    publish(store, 5)


def test_a_full_disk_is_storage_full(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "adapters")
    create(store)

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).symlink_to("/dev/full")  # the kernel's own ENOSPC
        (folder / ADAPTER_FILE).write_bytes(b"weights")

    with pytest.raises(StorageFull):
        store.publish(CheckpointId("otto", 1, 5), write, loss=None, rank=1, lora_alpha=1)
    assert store.last_checkpoint("otto", 1) is None
    assert list(store._staging._area.iterdir()) == []


def test_publishing_needs_the_version(store: AdapterStore) -> None:
    with pytest.raises(AdapterNotFound):
        publish(store, 1)
    create(store)

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(b"weights")
        store.delete("otto")

    with pytest.raises(AdapterNotFound):
        store.publish(CheckpointId("otto", 1, 5), write, loss=None, rank=1, lora_alpha=1)
    assert store.versions() == []


def test_a_version_with_nothing_in_it_is_taken_back(store: AdapterStore) -> None:
    create(store)
    publish(store, 5)
    create(store, new_version=True)
    for version in (1, 2, 3):
        store.discard("otto", version)
    assert [v.meta.version for v in store.versions()] == [1]


def test_files_of_a_checkpoint(place: Place, store: AdapterStore) -> None:
    create(store)
    record = publish(store, 5)
    other = place.open("two")
    assert other.is_here(record) is not place.remote
    assert other.file(record.id, "training-state.json").read_text() == "{}"
    with other.checkout(record.id) as folder:
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
            ADAPTER_FILE: b"weights",
            "training-state.json": b"{}",
        }
    assert not folder.exists()
    assert other.is_here(record)
    with pytest.raises(FileNotFoundError):
        other.file(record.id, "../manifest.json")
    with pytest.raises(AdapterNotFound):
        other.file(CheckpointId("otto", 1, 6))


@pytest.mark.parametrize("harm", ["rot", "lose"])
def test_a_damaged_file_is_quarantined_and_healed(place: Place, store: AdapterStore, harm: str) -> None:
    record, well = adopt(store), adopt(store, "anna", b"intact")
    other = place.open("two")
    rot(store, b"Weights", record.sha256) if harm == "rot" else lose(store, record.sha256)
    use = other.resolve(AdapterRef("otto"))  # nobody has looked at the file yet
    with pytest.raises(DataLoss, match="otto@v1@0"):
        other.fetch(use)
    for handle in (store, other):
        assert [(v.meta.name, v.damaged) for v in handle.versions()] == [("anna", False), ("otto", True)]
        with pytest.raises(DataLoss, match="otto@v1@0"):
            handle.resolve(AdapterRef("otto"))
        assert handle.fetch(handle.resolve(AdapterRef("anna"))).read_bytes() == b"intact"
    assert len(keys(store, "quarantine")) == 1
    adopt(store, "again", b"weights")  # the same content from anywhere
    for handle in (store, other):
        assert not any(v.damaged for v in handle.versions())
        assert handle.fetch(handle.resolve(AdapterRef("otto"))).read_bytes() == b"weights"
    assert keys(store, "quarantine") == set()
    assert well.sha256 != record.sha256


def test_a_rotten_file_in_the_cache_is_fetched_again(bucket: Place) -> None:
    store = bucket.open()
    record = adopt(store)
    Path(record.path).write_bytes(b"Weights")
    assert store.fetch(store.resolve(AdapterRef("otto"))).read_bytes() == b"weights"
    assert not store.version("otto").damaged


def test_one_damaged_manifest_damages_only_itself(place: Place, store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    publish(store, 200)
    create(store, "anna")
    for key in ("names/otto/v1/000200.json", "names/anna/v1/version.json"):
        store._objects.remove(key)
        store._objects.create(key, b"[]" if "otto" in key else b"{")
    for handle in (store, place.open("two")):
        anna, otto = handle.versions()
        assert (anna.meta.name, anna.meta.version, anna.checkpoints) == ("anna", 1, ())
        assert [(r.id.step, r.damaged) for r in otto.checkpoints] == [(100, False), (200, True)]
        assert handle.resolve(AdapterRef("otto", "100")).checkpoint.step == 100
        with pytest.raises(DataLoss, match="otto@v1@200"):
            handle.resolve(AdapterRef("otto"))


def test_listing_reads_no_weights(store: AdapterStore) -> None:
    create(store)
    record = publish(store, 100)
    lose(store, record.sha256)
    assert store.versions()[0].checkpoints[0].size_bytes == 7


def test_a_small_cache_lets_the_oldest_go(bucket: Place) -> None:
    store = bucket.open()
    small = bucket.open("small", cache_bytes=250)
    uses = {}
    for name in ("anna", "bolt", "otto"):
        adopt(store, name, name.encode() * 25)  # 100 bytes
        uses[name] = store.resolve(AdapterRef(name))
    for name in ("anna", "bolt", "anna", "otto"):
        assert small.fetch(uses[name]).read_bytes() == name.encode() * 25
    here = {v.meta.name: small.is_here(v.checkpoints[0]) for v in small.versions()}
    assert here == {"anna": True, "bolt": False, "otto": True}
    assert small.fetch(uses["bolt"]).read_bytes() == b"bolt" * 25


def _claim(place: Place) -> list[int]:
    store = place.open(str(os.getpid()))
    return [create(store, new_version=True).version for _ in range(5)]


def _claim_first(place: Place) -> bool:
    try:
        adopt(place.open(str(os.getpid())), "race", str(os.getpid()).encode())
    except AdapterExists:
        return False
    return True


def test_processes_never_share_a_version(place: Place) -> None:
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        claimed = [number for numbers in pool.map(_claim, [place] * 2) for number in numbers]
        assert sorted(claimed) == list(range(1, 11))
        assert sum(pool.map(_claim_first, [place] * 4)) == 1


_PUBLISHER = """
import sys
from pathlib import Path
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import CheckpointId
def write(folder):
    (folder / "adapter.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
store = AdapterStore(sys.argv[1], cache=Path(sys.argv[2]))
store.publish(CheckpointId("otto", 1, 200), write, loss=None, rank=1, lora_alpha=1)
"""


def test_a_process_killed_while_writing_leaves_nothing(place: Place, store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    before = keys(store)
    command = [sys.executable, "-c", _PUBLISHER, str(place.location), str(place.scratch / "cache-one")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as publisher:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"writing\n"
        other = place.open()
        assert [r.id.step for r in other.versions()[0].checkpoints] == [100]
        other.sweep()
        assert len(list(store._staging._area.glob("*/*"))) == 1  # somebody alive is writing: not swept
        os.kill(publisher.pid, signal.SIGKILL)
        publisher.wait()
        assert [r.id.step for r in other.versions()[0].checkpoints] == [100]
        other.sweep()
    assert keys(store) == before
    assert list(store._staging._area.iterdir()) == []
    publish(store, 200)
    assert store.resolve(AdapterRef("otto")).checkpoint.step == 200


def test_a_store_that_is_not_there_yet_is_empty(store: AdapterStore) -> None:
    store.open()
    assert store.versions() == []
    with pytest.raises(AdapterNotFound):
        store.resolve(AdapterRef("otto"))
