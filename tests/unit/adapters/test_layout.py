"""A data directory of the first release opens, whatever it was cut short in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from atelier_server.adapters import layout
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import DataLoss


def old_version(root: Path, name: str, version: int, *steps: int) -> None:
    """As the first release wrote it."""
    folder = root / name / f"v{version}"
    folder.mkdir(parents=True)
    meta = {
        "name": name,
        "version": version,
        "trigger": "a sks octopus",
        "base_model": "pocket",
        "base_sha256": "00ff",
        "training": f"{name}-k3f9",
        "create_time": 1000.5,
    }
    (folder / "version.json").write_text(json.dumps(meta))
    for step in steps:
        checkpoint = folder / f"{step:06d}"
        checkpoint.mkdir()
        content = f"{name} {version} {step}".encode()
        (checkpoint / ADAPTER_FILE).write_bytes(content)
        (checkpoint / "training-state.json").write_text(f"state {step}")
        manifest = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "size_bytes": len(content),
            "create_time": 1001.5,
            "loss": 0.25,
            "rank": 8,
            "lora_alpha": 4.0,
        }
        (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "adapters"
    old_version(root, "otto", 1, 100, 1_000_000)
    old_version(root, "otto", 2, 50)
    old_version(root, "names", 1, 7)  # names of today's folders were names of adapters too
    old_version(root, "blobs", 1)
    (root / ".staging").mkdir()
    return root


def check(store: AdapterStore) -> None:
    found = {(v.meta.name, v.meta.version): [r.id.step for r in v.checkpoints] for v in store.versions()}
    assert found == {("blobs", 1): [], ("names", 1): [7], ("otto", 1): [100, 1_000_000], ("otto", 2): [50]}
    use = store.resolve(AdapterRef("otto", "v1"))
    assert store.fetch(use).read_bytes() == b"otto 1 1000000"
    with store.checkout(CheckpointId("otto", 1, 100)) as folder:
        assert (folder / "training-state.json").read_text() == "state 100"
    version = store.version("otto", 1)
    assert (version.meta.training, version.meta.create_time) == ("otto-k3f9", 1000.5)
    assert (version.checkpoints[0].loss, version.checkpoints[0].rank) == (0.25, 8)


def test_an_old_folder_opens(root: Path) -> None:
    store = AdapterStore(root)
    store.open()
    check(store)
    assert sorted(path.name for path in root.iterdir()) == [".staging", "blobs", "names"]
    store.open()
    check(store)


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_migration_cut_short_goes_on(root: Path, monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    calls = iter(range(1000))

    def counted(function):
        def call(*args, **kwargs):
            if next(calls) == cut:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        objects = AdapterStore(root)._objects
        patch.setattr(type(objects), "create", counted(type(objects).create))
        patch.setattr(layout.shutil, "rmtree", counted(layout.shutil.rmtree))
        with pytest.raises(KeyboardInterrupt):
            AdapterStore(root).open()
    store = AdapterStore(root)
    store.open()
    check(store)


def test_what_was_rotten_before_is_said_to_be(root: Path) -> None:
    (root / "otto/v2/000050" / ADAPTER_FILE).write_bytes(b"rotten")
    (root / "otto/v1/000100/manifest.json").write_text("{")
    store = AdapterStore(root)
    store.open()
    with pytest.raises(DataLoss, match="otto@v2@50"):
        store.fetch(store.resolve(AdapterRef("otto")))
    with pytest.raises(DataLoss, match="otto@v1@100"):
        store.file(CheckpointId("otto", 1, 100))
    assert store.fetch(store.resolve(AdapterRef("otto", "v1"))).read_bytes() == b"otto 1 1000000"
