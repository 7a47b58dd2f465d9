"""Adapters that keep their slots: how many there can be, and what becomes of them with a worker."""

from __future__ import annotations

import asyncio

import pytest

from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.errors import AdapterNotFound, TooManyPins
from atelier_server.jobs.calls import Calls
from atelier_server.jobs.pins import Pins
from atelier_server.messages import (
    AbandonCall,
    AdapterLoaded,
    CallFailed,
    Command,
    LoadAdapter,
    UnloadAdapter,
)
from atelier_server.metrics import Metrics


class Desk:
    """A worker that loads what it is told to, but for `missing`."""

    def __init__(self, slots: int = 4) -> None:
        self.sent: list[LoadAdapter] = []
        self.missing: set[str] = set()
        self.calls = Calls(self._take)
        self.metrics = Metrics()
        self.pins = Pins(self.calls, self.metrics, slots=slots, kept_free=2)
        self.calls.worker_ready()

    def _take(self, command: Command) -> None:
        assert isinstance(command, LoadAdapter)
        self.sent.append(command)
        if command.use.checkpoint.name in self.missing:
            self.calls.handle(CallFailed(command.call_id, "ADAPTER_NOT_FOUND", "it is gone", ()))
        else:
            self.calls.handle(AdapterLoaded(command.call_id, True))

    @property
    def pinned(self) -> set[str]:
        return {checkpoint.name for checkpoint in self.pins.pinned()}

    @property
    def counted(self) -> float | None:
        return self.metrics.registry.get_sample_value("atelier_adapters_pinned")


def use(name: str) -> AdapterUse:
    return AdapterUse(CheckpointId(name, 1, 0), 1.0, f"{name}.safetensors", name)


async def test_a_pin_is_the_workers_and_is_counted() -> None:
    desk = Desk()
    await desk.pins.load(use("otto"), pin=False)
    assert (desk.pinned, desk.counted) == (set(), 0)
    await desk.pins.load(use("otto"), pin=True)
    assert [command.pin for command in desk.sent] == [False, True]
    assert (desk.pinned, desk.counted) == ({"otto"}, 1)
    desk.pins.release([CheckpointId("otto", 1, 0), CheckpointId("nobody", 1, 0)])
    assert (desk.pinned, desk.counted) == (set(), 0)


async def test_the_slots_that_a_picture_may_need_stay_without() -> None:
    desk = Desk(slots=4)
    for name in ("otto", "bolt", "otto"):
        await desk.pins.load(use(name), pin=True)
    with pytest.raises(TooManyPins, match="2 adapters are pinned, and of 4 slots 2 can be"):
        await desk.pins.load(use("ada"), pin=True)
    await desk.pins.load(use("ada"), pin=False)
    desk.pins.release([use("otto").checkpoint])
    await desk.pins.load(use("ada"), pin=True)
    assert desk.pinned == {"ada", "bolt"}


async def test_what_cannot_be_loaded_is_not_pinned() -> None:
    desk = Desk()
    desk.missing = {"otto"}
    with pytest.raises(AdapterNotFound):
        await desk.pins.load(use("otto"), pin=True)
    assert desk.pinned == set()


async def test_a_new_worker_gets_them_again() -> None:
    desk = Desk()
    for name in ("otto", "bolt"):
        await desk.pins.load(use(name), pin=True)
    desk.sent.clear()
    desk.calls.worker_lost()
    desk.missing = {"bolt"}
    desk.calls.worker_ready()
    desk.pins.worker_ready()
    await asyncio.gather(*desk.pins._reloading)
    assert desk.pinned == {"otto"}
    assert {(command.use.checkpoint.name, command.pin) for command in desk.sent} == {
        ("otto", True),
        ("bolt", True),
    }


async def test_who_goes_while_it_is_being_pinned_leaves_no_pin_in_the_worker() -> None:
    sent: list[Command] = []
    asked = asyncio.Event()

    def take(command: Command) -> None:
        sent.append(command)
        asked.set()

    calls = Calls(take)
    calls.worker_ready()
    pins = Pins(calls, Metrics(), slots=4, kept_free=2)
    loading = asyncio.create_task(pins.load(use("otto"), pin=True))
    await asked.wait()
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading
    assert pins.pinned() == frozenset()
    assert [type(command) for command in sent] == [LoadAdapter, AbandonCall, UnloadAdapter]
    assert sent[-1].checkpoints == (use("otto").checkpoint,)  # type: ignore[union-attr]
