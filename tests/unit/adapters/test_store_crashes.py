"""Publishers and S3 servers killed at every point of a publish: an adapter is seen whole, or not at all."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import fsspec
import pytest
from s3fs import S3FileSystem

from atelier_server.adapters.objects import LocalObjects, Objects, RemoteObjects
from atelier_server.adapters.store import ADAPTER_FILE, AdapterStore
from atelier_server.core import AdapterRef, CheckpointId
from atelier_server.errors import AdapterNotFound, StoreUnavailable
from tests.s3 import Relay, S3Server
from tests.unit.adapters.places import Place, adopt, create, keys, publish

# Forks of a server that has imported everything, and has no threads.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload([__name__])
_CUTS = range(6)  # before and after each of: the weights, the training's state, the manifest


@contextmanager
def dying_at(cut: int, kill: Callable[[], None]) -> Iterator[None]:
    """Runs `kill` before (even) or after (odd) the write number cut // 2 of any store in this process."""
    count = [0]
    patched: list[tuple[type[Objects], str, Any]] = []

    def wrap(kind: type[Objects], name: str) -> None:
        write = getattr(kind, name)

        def call(*arguments: Any) -> Any:
            number = count[0]
            count[0] += 1
            if (number, cut % 2) == (cut // 2, 0):
                kill()
            result = write(*arguments)
            if (number, cut % 2) == (cut // 2, 1):
                kill()
            return result

        patched.append((kind, name, write))
        setattr(kind, name, call)

    for kind in (LocalObjects, RemoteObjects):
        for name in ("put", "create"):
            wrap(kind, name)
    try:
        yield
    finally:
        for kind, name, write in patched:
            setattr(kind, name, write)


def publish_two_files(store: AdapterStore, number: int) -> None:
    """Contents of their own for each number: what is stored already is not written again."""

    def write(folder: Path) -> None:
        (folder / ADAPTER_FILE).write_text(f"weights {number}")
        (folder / "training-state.json").write_text(f"state {number}")

    store.publish(CheckpointId("otto", 1, 200), write, loss=None, rank=1, lora_alpha=1.0)


def _publish_and_die(place: Place, cut: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with dying_at(cut, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        publish_two_files(place.open("victim"), cut)


def _adopt_and_die(place: Place, cut: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with dying_at(cut, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        adopt(place.open("victim"), "guest", b"guest %d" % cut)


def check_whole(store: AdapterStore, *, visible: bool) -> None:
    (version,) = store.versions()
    assert [record.id.step for record in version.checkpoints] == ([100, 200] if visible else [100])
    for record in version.checkpoints:
        with store.checkout(record.id) as folder:
            assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_FILE, "training-state.json"]


def test_a_publisher_killed_at_every_point(place: Place) -> None:
    store = place.open()
    create(store)
    publish(store, 100, content=b"one hundred")
    for cut in _CUTS:
        victim = _CONTEXT.Process(target=_publish_and_die, args=(place, cut, dict(os.environ)))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        check_whole(place.open("reader"), visible=cut == _CUTS[-1])
    store.sweep()
    place.open("victim").sweep()
    publish_two_files(store, _CUTS[-1])  # the same, once more
    check_whole(place.open("reader"), visible=True)
    late = place.open("late", grace=0.0)
    late.trash.collect(3600)  # what nobody names, and what the older checkpoint's training needed
    assert len(keys(store, "blobs")) == 4
    assert late.file(CheckpointId("otto", 1, 100)).read_bytes() == b"one hundred"
    with late.checkout(CheckpointId("otto", 1, 200)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [ADAPTER_FILE, "training-state.json"]
    assert not any(version.damaged for version in late.versions())


def test_an_importer_killed_at_every_point(place: Place) -> None:
    for cut in range(4):
        victim = _CONTEXT.Process(target=_adopt_and_die, args=(place, cut, dict(os.environ)))
        victim.start()
        victim.join()
        assert victim.exitcode == -signal.SIGKILL
        reader = place.open("reader")
        if cut < 3:
            assert reader.versions() == []  # the name is free
            with pytest.raises(AdapterNotFound):
                reader.resolve(AdapterRef("guest"))
        else:
            assert reader.file(CheckpointId("guest", 1, 0)).read_bytes() == b"guest 3"


@pytest.fixture
def own_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """A server that a test may kill."""
    server = S3Server().start()
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    S3FileSystem.clear_instance_cache()
    yield server
    server.kill()
    S3FileSystem.clear_instance_cache()


def test_an_s3_server_killed_at_every_point(
    own_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """moto keeps everything in memory: what is back after a kill is an empty bucket."""
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    place = Place("s3://atelier/store", tmp_path)
    for cut in (1, 4, 5):  # with the weights there; before the manifest; with all there, but unanswered
        store = place.open("one")
        create(store)
        publish(store, 100, content=b"one hundred")
        with dying_at(cut, own_server.kill), pytest.raises(StoreUnavailable):
            publish_two_files(store, cut)
        with pytest.raises(StoreUnavailable):
            place.open("reader").versions()
        assert list(store._staging._area.iterdir()) == []
        own_server.start()
        assert place.open("reader").versions() == []


def test_a_line_cut_at_every_byte(
    bucket: Place, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's machine dies (its disk does not) while a publish is on its way, at evenly spread bytes."""
    weights = os.urandom(20_000)
    monkeypatch.setattr(S3FileSystem, "retries", 1)
    bound = _bytes_of_a_publish(bucket, s3_server, monkeypatch, weights)
    seen = set()
    for number in range(4):
        cut = bound * number // 3
        place = Place(f"{bucket.location}/{number}", bucket.scratch)
        with _connected(monkeypatch, s3_server.port):
            create(place.open("before"))
        relay = Relay(s3_server.port, cut)
        with _connected(monkeypatch, relay.port):
            store = place.open("one")
            try:
                publish(store, 100, content=weights)
                seen.add("whole")
            except StoreUnavailable:
                seen.add("cut")
            assert list(store._staging._area.glob("*")) == []
        relay.close()
        with _connected(monkeypatch, s3_server.port):
            reader = place.open(f"reader-{number}")
            for record in reader.version("otto", 1).checkpoints:
                assert reader.file(record.id).read_bytes() == weights
            publish(reader, 100, content=weights)
            assert reader.resolve(AdapterRef("otto")).checkpoint.step == 100
    assert seen == {"whole", "cut"}


def _bytes_of_a_publish(
    bucket: Place, server: S3Server, monkeypatch: pytest.MonkeyPatch, weights: bytes
) -> int:
    place = Place(f"{bucket.location}/measure", bucket.scratch)
    relay = Relay(server.port, None)
    with _connected(monkeypatch, relay.port):
        create(place.open())
        before = relay.forwarded
        publish(place.open("measured"), 100, content=weights)
        total = relay.forwarded - before
    relay.close()
    return total


@contextmanager
def _connected(monkeypatch: pytest.MonkeyPatch, port: int) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        S3FileSystem.clear_instance_cache()
        yield
    S3FileSystem.clear_instance_cache()


def test_a_store_without_conditional_writes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = AdapterStore("memory://naive/store", cache=tmp_path)
    store.open()
    fs = fsspec.filesystem("memory")
    write = fs.pipe_file
    monkeypatch.setattr(type(fs), "pipe_file", lambda self, path, data, mode="": write(path, data))
    with pytest.raises(StoreUnavailable, match="If-None-Match"):
        AdapterStore("memory://naive/store", cache=tmp_path).open()
    assert keys(store) == set()


def test_a_store_that_cannot_be_reached_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: Place
) -> None:
    with pytest.raises(StoreUnavailable, match="nobody"):
        AdapterStore("nobody://x/y", cache=tmp_path).open()
    with pytest.raises(StoreUnavailable, match="bucket"):
        AdapterStore("s3://no-such-bucket/x", cache=tmp_path).open()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with _connected(monkeypatch, port), pytest.raises(StoreUnavailable, match="cannot be used now"):
        AdapterStore("s3://atelier/x", cache=tmp_path).open()
