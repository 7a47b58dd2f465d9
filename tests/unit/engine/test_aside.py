"""Calls beside the loop: what they try on the device waits for its turn, never for a loop that has ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

import pytest

from atelier_server.core import AdapterUse, CheckpointId
from atelier_server.engine.aside import DeviceWork
from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.runner import OnDevice
from atelier_server.engine.samples import SampleDefaults
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import ServerDraining
from atelier_server.messages import (
    AbandonCall,
    AdapterExported,
    AdapterImported,
    CallFailed,
    CallProgress,
    Drain,
    Event,
    ExportAdapter,
    ExtractAdapter,
    GenerationCompleted,
    ImportAdapter,
    Submit,
)
from atelier_server.report import AdapterReport, ImportTerms, PublishAs
from tests.fakes import FakeRunner, generation, use


class Desk:
    """A real loop on this thread, with a real thread aside."""

    def __init__(
        self, aside: ThreadPoolExecutor, runner: FakeRunner | None = None, heard: Callable[[], None] = int
    ) -> None:
        self.heard = heard
        self.events: list[Event] = []
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.loop = Loop(
            runner=runner or FakeRunner(),
            inbox=self.inbox,
            emit=self.emit,
            slots=4,
            sample_defaults=SampleDefaults(64, 64, "ddim"),
            aside=aside,
        )

    def emit(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, CallProgress):
            self.heard()
        if isinstance(event, AdapterImported):
            self.inbox.put(Drain())


def test_what_an_import_tries_is_done_between_the_steps_of_a_picture() -> None:
    with ThreadPoolExecutor(1) as aside:
        desk = Desk(aside)
        desk.inbox.put(Submit(generation("a")))
        desk.inbox.put(ImportAdapter("1", "f", "n", False, ImportTerms()))
        desk.loop.run()
    [imported] = [event for event in desk.events if isinstance(event, AdapterImported)]
    assert imported.report.probe == 0.5
    assert any(isinstance(event, GenerationCompleted) for event in desk.events)


class Stuck(FakeRunner):
    """In the middle of a step until an import has been read."""

    def __init__(self) -> None:
        super().__init__()
        self.stepping, self.reading = threading.Event(), threading.Event()

    def denoise(
        self, tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]
    ) -> list[bool]:
        self.stepping.set()
        assert self.reading.wait(30)
        return super().denoise(tasks, bucket, slots)

    def import_adapter(
        self, path: str, name: str, new_version: bool, terms: ImportTerms, on_device: OnDevice
    ) -> tuple[CheckpointId, AdapterReport]:
        self.reading.set()
        return super().import_adapter(path, name, new_version, terms, on_device)


def test_a_call_beside_the_loop_does_not_wait_for_the_step_in_hand() -> None:
    runner = Stuck()
    with ThreadPoolExecutor(1) as aside, ThreadPoolExecutor(1) as front:
        desk = Desk(aside, runner)
        desk.loop.put(Submit(generation("a")))

        def ask() -> None:
            assert runner.stepping.wait(30)
            desk.loop.put(ImportAdapter("1", "f", "n", False, ImportTerms()))

        front.submit(ask)
        desk.loop.run()
    assert any(isinstance(event, AdapterImported) for event in desk.events)


def test_a_call_that_comes_after_the_end_is_refused() -> None:
    desk = Desk(ThreadPoolExecutor(1))
    desk.loop.put(Drain())
    desk.loop.run()
    desk.loop.put(ImportAdapter("1", "f", "n", False, ImportTerms()))
    [refused] = [event for event in desk.events if isinstance(event, CallFailed)]
    assert (refused.call_id, refused.reason) == ("1", "SERVER_DRAINING")


@pytest.mark.parametrize("first", ["import", "drain"])
def test_an_import_at_the_end_is_refused_and_holds_nothing_up(first: str) -> None:
    with ThreadPoolExecutor(1) as aside:
        desk = Desk(aside)
        messages: list[Message] = [ImportAdapter("1", "f", "n", False, ImportTerms()), Drain()]
        for message in messages if first == "import" else [messages[1], messages[0]]:
            desk.inbox.put(message)
        desk.loop.run()
    answers = [event for event in desk.events if isinstance(event, AdapterImported | CallFailed)]
    assert len(answers) == 1  # done just in time, or refused
    assert isinstance(answers[0], AdapterImported) or answers[0].reason == "SERVER_DRAINING"


class Exporting(FakeRunner):
    """Is not done with an export before the loop has ended."""

    def __init__(self) -> None:
        super().__init__()
        self.desk: Desk | None = None

    def export_adapter(self, use: AdapterUse, layout: str, path: str) -> tuple[int, str]:
        assert self.desk is not None
        self.desk.inbox.put(Drain())
        assert self.desk.loop._aside._ended.wait(30)
        return super().export_adapter(use, layout, path)


def test_what_is_under_way_at_the_end_is_answered_and_what_waits_is_refused() -> None:
    with ThreadPoolExecutor(1) as aside:
        runner = Exporting()
        desk = runner.desk = Desk(aside, runner)
        for call_id in ("1", "2"):
            desk.inbox.put(ExportAdapter(call_id, use("ada"), "diffusers", "path"))
        desk.loop.run()
        answers = list(desk.events)  # all that the front will hear
    assert [type(answer) for answer in answers] == [AdapterExported, CallFailed]
    assert isinstance(answers[1], CallFailed)
    assert (answers[1].call_id, answers[1].reason) == ("2", "SERVER_DRAINING")


def test_refused_work_tells_its_caller_and_is_not_run() -> None:
    ran = []
    work = DeviceWork(lambda: ran.append(1), Future())  # type: ignore[func-returns-value]
    work.refuse()
    assert not ran
    with pytest.raises(ServerDraining):
        work.done.result(0)


def test_work_that_fails_tells_its_caller() -> None:
    def broken() -> float:
        raise ValueError("no")

    work = DeviceWork(broken, Future())
    work.run()
    with pytest.raises(ValueError, match="no"):
        work.done.result(0)


class Extracting(FakeRunner):
    """Extracts for as long as its progress is heard."""

    def extract_adapter(
        self,
        tuned: str,
        base: str,
        rank: int,
        target: PublishAs,
        progress: Callable[[int, int], None],
        *,
        public: bool,
    ) -> tuple[CheckpointId, float]:
        for layer in range(10**9):
            progress(layer, 10**9)
        raise AssertionError("nobody ended it")


@pytest.mark.parametrize("end", [AbandonCall("1"), Drain()])
def test_an_extraction_ends_with_its_caller_or_with_the_worker(end: Message) -> None:
    told = threading.Event()
    with ThreadPoolExecutor(1) as aside:
        desk = Desk(aside, Extracting(), heard=told.set)
        desk.inbox.put(ExtractAdapter("1", "tuned", "", 4, PublishAs("n", False, ""), public=True))
        desk.loop.turn()
        assert told.wait(30)
        desk.inbox.put(end)
        desk.inbox.put(Drain())
        desk.loop.run()
    assert isinstance(desk.events[0], CallProgress)
    assert isinstance(desk.events[-1], CallFailed)
    assert desk.events[-1].reason in {"CANCELLED", "SERVER_DRAINING"}
