"""The host tier: what is read once, what is forgotten, and what failures leave behind."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.host import HostTier, size_bytes
from atelier_server.core import AdapterUse
from atelier_server.errors import AdapterNotFound
from tests.fakes import use

ONE = 64  # bytes of an adapter here


def adapter(value: float) -> CanonicalAdapter:
    return CanonicalAdapter({"unet.x": LoraModule(torch.full((1, 8), value), torch.full((8, 1), value), 1.0)})


class Disk:
    """Counts its readers."""

    def __init__(self) -> None:
        self.read: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.missing: set[str] = set()

    def __call__(self, wanted: AdapterUse) -> CanonicalAdapter:
        self.gate.wait(30)
        self.read.append(wanted.path)
        if wanted.path in self.missing:
            raise AdapterNotFound("gone", name=wanted.path)
        return adapter(float(len(wanted.path)))


def test_an_adapter_is_read_once() -> None:
    disk = Disk()
    host = HostTier(disk, 10 * ONE)
    first, held = host.fetch(use("a"))
    assert not held
    second, held = host.fetch(use("a", weight=0.5))
    assert held
    assert second is first
    assert (len(host), host.size_bytes, disk.read) == (1, ONE, ["a.safetensors"])
    assert host.contents() == {use("a").sha256}


def test_who_fetches_while_it_is_read_ahead_waits_for_the_same_reading() -> None:
    disk = Disk()
    disk.gate.clear()
    host = HostTier(disk, 10 * ONE)
    host.prefetch(use("a"))
    host.prefetch(use("a"))
    with ThreadPoolExecutor(4) as pool:
        fetched = [pool.submit(host.fetch, use("a")) for _ in range(4)]
        disk.gate.set()
        assert all(future.result()[1] for future in fetched)
    assert disk.read == ["a.safetensors"]


def test_who_fetches_does_not_wait_for_what_others_read_ahead() -> None:
    reading, gate = threading.Event(), threading.Event()
    read: list[str] = []

    def slow_a(wanted: AdapterUse) -> CanonicalAdapter:
        read.append(wanted.path)
        if wanted.path == "a.safetensors":
            reading.set()
            assert gate.wait(30)
        return adapter(1.0)

    host = HostTier(slow_a, 10 * ONE)
    host.prefetch(use("a"))
    host.prefetch(use("b"))
    assert reading.wait(30)
    with ThreadPoolExecutor(1) as pool:
        fetched = pool.submit(host.fetch, use("b"))
        try:
            assert not fetched.result(5)[1]
        finally:
            gate.set()
    assert host.fetch(use("a"))[1]
    assert host.fetch(use("b"))[1]
    assert read == ["a.safetensors", "b.safetensors"]


def test_a_failure_is_told_and_not_kept() -> None:
    disk = Disk()
    disk.missing = {"a.safetensors"}
    host = HostTier(disk, 10 * ONE)
    for _ in range(2):
        with pytest.raises(AdapterNotFound):
            host.fetch(use("a"))
    assert (len(host), host.size_bytes) == (0, 0)
    disk.missing = set()
    assert not host.fetch(use("a"))[1]


def test_no_room_means_reading_each_time() -> None:
    disk = Disk()
    host = HostTier(disk, 0)
    for _ in range(2):
        assert not host.fetch(use("a"))[1]
    assert (len(host), host.size_bytes, len(disk.read)) == (0, 0, 2)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(0, 6))
def test_what_is_held_fits_and_is_the_most_recently_used(wanted: list[int], room: int) -> None:
    host = HostTier(Disk(), room * ONE)
    recent: list[int] = []
    for number in wanted:
        _, held = host.fetch(use(f"a{number}"))
        assert held == (number in recent)
        recent = [*(n for n in recent if n != number), number][-room:] if room else []
        assert (len(host), host.size_bytes) == (len(recent), len(recent) * ONE)


def test_the_size_counts_every_tensor() -> None:
    tokens = {"<x>": {"text_encoder": torch.zeros(2, 4)}}
    assert size_bytes(CanonicalAdapter(adapter(1.0).modules, tokens)) == ONE + 32


@pytest.mark.parametrize("lost", ["its first reading failed", "it was pushed out"])
def test_what_is_announced_again_while_its_first_place_in_line_is_left_is_still_read(lost: str) -> None:
    reading, gate = threading.Event(), threading.Event()
    fails = [lost == "its first reading failed"]

    def read(wanted: AdapterUse) -> CanonicalAdapter:
        if wanted.path == "a.safetensors":
            reading.set()
            assert gate.wait(30)
        if wanted.path == "b.safetensors" and fails.pop():
            raise AdapterNotFound("gone", name="b")
        fails.append(False)
        return adapter(1.0)

    host = HostTier(read, 10 * ONE if fails[0] else ONE)
    host.prefetch(use("a"))
    assert reading.wait(30)
    host.prefetch(use("b"))  # in line behind a
    if fails[0]:
        with pytest.raises(AdapterNotFound):
            host.fetch(use("b"))
        fails.append(False)
    else:
        host.fetch(use("b"))
        host.fetch(use("c"))
    host.prefetch(use("b"))
    gate.set()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(host.fetch, use("b")).result(timeout=30)
