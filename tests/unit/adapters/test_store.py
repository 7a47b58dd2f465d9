"""The store: atomic, immutable, shared by processes, deaf to paths."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore, VersionMeta
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterExists, AdapterNotFound, DataLoss, InvalidRequest, StorageFull


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    return AdapterStore(tmp_path / "adapters")


def create(store: AdapterStore, name: str = "otto", *, new_version: bool = False) -> VersionMeta:
    return store.create_version(
        name=name,
        trigger="a sks octopus",
        base_model="pocket",
        base_sha256="00ff",
        training=f"{name}-1",
        new_version=new_version,
    )


def publish(store: AdapterStore, step: int, *, version: int = 1, content: bytes = b"weights") -> None:
    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_bytes(content)
        (folder / "training-state.json").write_text("{}")

    store.publish(CheckpointId("otto", version, step), write, loss=0.25, rank=8, lora_alpha=4.0)


def files(store: AdapterStore) -> set[str]:
    return {str(p.relative_to(store._root)) for p in store._root.rglob("*") if p.is_file()}


def test_what_is_published_is_found(store: AdapterStore) -> None:
    meta = create(store)
    assert (meta.name, meta.version, meta.trigger) == ("otto", 1, "a sks octopus")
    assert store.version("otto", 1).checkpoints == ()
    assert store.last_checkpoint("otto", 1) is None
    publish(store, 100)
    publish(store, 1_000_000, content=b"later")
    publish(store, 750)
    (found,) = store.versions()
    assert found.meta == meta
    assert found.tags == ("v1",)
    assert [record.id.step for record in found.checkpoints] == [100, 750, 1_000_000]
    last = found.recommended
    assert last == store.last_checkpoint("otto", 1)
    assert last is not None
    assert (last.size_bytes, last.loss, last.rank, last.lora_alpha) == (5, 0.25, 8, 4.0)
    assert Path(last.path).read_bytes() == b"later"
    store.verify(last)


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


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "", ".", "Otto", "o\n", "o\0", "x" * 64, ".staging"])
def test_a_name_that_is_none_never_becomes_a_path(store: AdapterStore, name: str) -> None:
    with pytest.raises(InvalidRequest):
        create(store, name)
    for call in (store.version, store.delete, lambda n: store.folder(CheckpointId(n, 1, 1))):
        with pytest.raises(AdapterNotFound):
            call(name)
    with pytest.raises(AdapterNotFound):
        store.resolve(AdapterRef(name))
    assert store.last_checkpoint(name, 1) is None
    assert not store._root.exists()


def test_a_published_step_is_immutable(store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    before = store.last_checkpoint("otto", 1)
    publish(store, 100)  # the same weights once more: nothing happens
    with pytest.raises(AdapterExists):
        publish(store, 100, content=b"other")
    assert store.last_checkpoint("otto", 1) == before
    assert len(files(store)) == 4


def test_a_failing_write_leaves_nothing(store: AdapterStore) -> None:
    create(store)
    before = files(store)

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
    with pytest.raises(ValueError, match="nan"):
        store.publish(CheckpointId("otto", 1, 5), lambda _: None, loss=float("nan"), rank=1, lora_alpha=1)
    assert files(store) == before
    assert list((store._root / ".staging").iterdir()) == []
    publish(store, 5)


def test_a_full_disk_is_storage_full(store: AdapterStore) -> None:
    create(store)

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).symlink_to("/dev/full")  # the kernel's own ENOSPC
        (folder / ADAPTER_FILE).write_bytes(b"weights")

    with pytest.raises(StorageFull):
        store.publish(CheckpointId("otto", 1, 5), write, loss=None, rank=1, lora_alpha=1)
    assert store.last_checkpoint("otto", 1) is None
    assert list((store._root / ".staging").iterdir()) == []


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


def test_delete(store: AdapterStore) -> None:
    create(store)
    create(store, new_version=True)
    publish(store, 100, version=2)
    create(store, "anna")
    store.delete("otto", 2)
    assert [v.meta.version for v in store.versions()] == [1, 1]
    store.delete("otto")
    assert [v.meta.name for v in store.versions()] == ["anna"]
    for version in (None, 1):
        with pytest.raises(AdapterNotFound):
            store.delete("otto", version)
    store.delete("anna", 1)
    assert files(store) == set()
    assert create(store, "anna").version == 1


def test_one_damaged_file_hides_only_itself(store: AdapterStore, caplog: pytest.LogCaptureFixture) -> None:
    create(store)
    publish(store, 100)
    publish(store, 200)
    create(store, "anna")
    (store.folder(CheckpointId("otto", 1, 200)) / "manifest.json").write_text("[]")
    (store._root / "anna" / "v1" / "version.json").write_text("{")
    assert [[r.id.step for r in v.checkpoints] for v in store.versions()] == [[100]]
    assert "manifest" in caplog.text
    assert "anna" in caplog.text


def test_verify_finds_a_changed_or_missing_file(store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    record = store.last_checkpoint("otto", 1)
    assert record is not None
    Path(record.path).write_bytes(b"Weights")
    with pytest.raises(DataLoss):
        store.verify(record)
    Path(record.path).unlink()
    with pytest.raises(DataLoss):
        store.verify(record)


def test_listing_reads_no_weights(store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    weights = store.folder(CheckpointId("otto", 1, 100)) / ADAPTER_FILE
    weights.unlink()
    assert store.versions()[0].checkpoints[0].size_bytes == 7


def _claim(root: str) -> list[int]:
    store = AdapterStore(Path(root))
    return [create(store, new_version=True).version for _ in range(10)]


def _claim_first(root: str) -> bool:
    try:
        create(AdapterStore(Path(root)), "race")
    except AdapterExists:
        return False
    return True


def test_processes_never_share_a_version(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4) as pool:
        claimed = [number for numbers in pool.map(_claim, [str(tmp_path)] * 4) for number in numbers]
        assert sorted(claimed) == list(range(1, 41))
        assert sum(pool.map(_claim_first, [str(tmp_path)] * 8)) == 1


_PUBLISHER = """
import sys
from pathlib import Path
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import CheckpointId
def write(folder):
    (folder / "adapter.safetensors").write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
AdapterStore(Path(sys.argv[1])).publish(CheckpointId("otto", 1, 200), write, loss=None, rank=1, lora_alpha=1)
"""


def test_a_process_killed_while_publishing_leaves_nothing_visible(store: AdapterStore) -> None:
    create(store)
    publish(store, 100)
    before = files(store)
    command = [sys.executable, "-c", _PUBLISHER, str(store._root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as publisher:
        assert publisher.stdout is not None
        assert publisher.stdout.readline() == b"writing\n"
        other = AdapterStore(store._root)
        assert [r.id.step for r in other.versions()[0].checkpoints] == [100]
        other.sweep()
        assert len(files(store)) == len(before) + 1  # somebody alive is writing: not swept
        os.kill(publisher.pid, signal.SIGKILL)
        publisher.wait()
        assert [r.id.step for r in other.versions()[0].checkpoints] == [100]
        other.sweep()
    assert files(store) == before
    publish(store, 200)
    assert store.resolve(AdapterRef("otto")).checkpoint.step == 200


def test_a_store_that_is_not_there_yet_is_empty(store: AdapterStore) -> None:
    store.sweep()
    assert store.versions() == []
    with pytest.raises(AdapterNotFound):
        store.resolve(AdapterRef("otto"))
