"""The loop over a runner that counts: order of events, cancels, failing alone, trainings between pictures."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from queue import SimpleQueue
from typing import Any

import pytest

from atelier_server.core import CheckpointId, Mode, State, TrainingJob
from atelier_server.engine.companies import Place
from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.runner import OnDevice, TrainingRun, TrainOutcome
from atelier_server.engine.samples import SampleDefaults
from atelier_server.engine.scheduler import ImageTask
from atelier_server.errors import NonfiniteLoss, StorageFull
from atelier_server.messages import (
    AdapterImported,
    AdapterLoaded,
    AdaptersUnloaded,
    CallFailed,
    Cancel,
    CheckpointPublished,
    Drain,
    Event,
    GenerationCompleted,
    ImageReady,
    ImportAdapter,
    JobCancelled,
    JobFailed,
    LoadAdapter,
    Pause,
    PreviewReady,
    Progress,
    Queued,
    Sample,
    SampleReady,
    Submit,
    TrainingCompleted,
    TrainingPaused,
    TrainingStarted,
    TrainingWarning,
    UnloadAdapter,
)
from atelier_server.report import AdapterReport, ImportTerms
from tests.fakes import REPORT, FakeRun, FakeRunner, generation, training, use


class AtOnce(Executor):
    """Does things when they are asked for."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        fn(*args, **kwargs)
        return Future()


class Desk:
    """A loop with its inbox filled beforehand; `run` works until everything is done."""

    def __init__(self, slots: int = 4) -> None:
        self.runner = FakeRunner()
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.events: list[Event] = []
        self.loop = Loop(
            runner=self.runner,
            inbox=self.inbox,
            emit=self.events.append,
            slots=slots,
            sample_defaults=SampleDefaults(64, 64, "ddim"),
            aside=AtOnce(),
            clock=lambda: self.runner.now,
        )

    def send(self, *messages: Message) -> Desk:
        for message in messages:
            self.inbox.put(message)
        return self

    def until(self, done: int) -> Desk:
        """Turns the loop until so many jobs have ended; a bounded number of times."""
        ends = GenerationCompleted | JobFailed | JobCancelled | TrainingCompleted
        for _ in range(500):
            self.loop.turn()
            if sum(isinstance(event, ends) for event in self.events) >= done and self.inbox.empty():
                return self
        raise AssertionError(f"still waiting: {self.events}")

    def of(self, *kinds: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]


def test_a_generation_from_queued_to_completed() -> None:
    desk = Desk().send(Submit(generation("a", num_images=2, num_inference_steps=3))).until(1)
    events = [event for event in desk.events if not isinstance(event, Sample)]
    assert events[0] == Queued("a", 0)
    assert isinstance(events[-1], GenerationCompleted)
    assert events[-1].bucket == 4
    assert desk.of(Progress)[-1] == Progress("a", 6, 6)
    assert [(e.index, e.seed, e.data) for e in desk.of(ImageReady)] == [(0, 1, b"a:0"), (1, 2, b"a:1")]
    assert desk.runner.progress == {}


def test_previews_come_every_so_many_steps_and_never_after_the_picture() -> None:
    jobs = generation("a", num_images=2, num_inference_steps=4, preview_steps=2), generation("b")
    desk = Desk().send(*(Submit(job) for job in jobs)).until(2)
    told = [(e.job_id, e.index, e.step, e.data) for e in desk.of(PreviewReady)]
    assert told == [("a", 0, 2, b"a:0 after 2"), ("a", 1, 2, b"a:1 after 2")]
    kinds = [type(e) for e in desk.of(PreviewReady, ImageReady)]
    assert kinds.index(ImageReady) > max(i for i, kind in enumerate(kinds) if kind is PreviewReady)


def test_a_picture_may_ask_for_the_rows_of_each_of_its_forwards() -> None:
    """It takes others along where its rows are left over, and never has more or fewer."""
    again = generation("again", mode=Mode.STRICT, bucket=2, buckets=(2, 8, 4), num_inference_steps=5)
    rows: list[tuple[str, int]] = []
    desk = Desk()
    denoise = desk.runner.denoise

    def noted(tasks: Sequence[ImageTask], bucket: int, slots: Mapping[CheckpointId, int]) -> list[bool]:
        rows.extend((task.job.id, bucket) for task in tasks)
        return denoise(tasks, bucket, slots)

    desk.runner.denoise = noted  # type: ignore[method-assign]
    desk.send(Submit(again), Submit(generation("other", num_inference_steps=4))).until(2)
    assert [bucket for name, bucket in rows if name == "again"] == [2, 8, 4, 4, 4]
    assert len([name for name, _ in rows if name == "other"]) == 4


def test_requests_share_forwards() -> None:
    desk = Desk().send(*(Submit(generation(name, adapters=(use(name),))) for name in "abc")).until(3)
    assert desk.runner.log.count(("denoise", ("a", "b", "c"))) == 3
    assert desk.of(Sample).count(Sample("batch_rows", 3.0)) == 3


def test_a_request_joins_between_two_steps() -> None:
    desk = Desk().send(Submit(generation("a", num_inference_steps=5)))
    desk.loop.turn()
    desk.send(Submit(generation("b", num_inference_steps=2))).until(2)
    order = [names for kind, names in desk.runner.log if kind == "denoise"]
    assert order == [("a",), ("a", "b"), ("a", "b"), ("a",), ("a",)]


def test_cancel_takes_effect_before_the_next_step() -> None:
    desk = Desk().send(Submit(generation("a", num_inference_steps=50)))
    desk.loop.turn()
    desk.send(Cancel("a"), Cancel("unknown")).until(1)
    assert desk.of(JobCancelled) == [JobCancelled("a")]
    assert desk.runner.log == [("denoise", ("a",))]
    assert desk.runner.progress == {}


def test_a_bad_adapter_fails_its_own_request_only() -> None:
    desk = Desk()
    desk.runner.missing = {"bad"}
    desk.send(Submit(generation("x", adapters=(use("bad"),))), Submit(generation("y"))).until(2)
    assert [e.job_id for e in desk.of(JobFailed)] == ["x"]
    assert desk.of(JobFailed)[0].reason == "ADAPTER_NOT_FOUND"  # type: ignore[union-attr]
    assert [e.job_id for e in desk.of(GenerationCompleted)] == ["y"]


def test_out_of_memory_splits_the_batch_and_fails_nobody_who_fits_alone() -> None:
    desk = Desk()
    desk.runner.memory_rows = 4
    desk.send(*(Submit(generation(name, num_images=2)) for name in "abc")).until(3)
    assert not desk.of(JobFailed)
    assert desk.of(Sample).count(Sample("out_of_memory_total", 1.0, ("generate",))) == 2
    assert {e.bucket for e in desk.of(GenerationCompleted)} == {4}


def test_out_of_memory_fails_only_what_cannot_be_made_smaller() -> None:
    desk = Desk()
    desk.runner.memory_rows = 4
    desk.send(Submit(generation("strict", mode=Mode.STRICT, bucket=8)), Submit(generation("fast"))).until(2)
    assert [(e.job_id, e.reason, e.metadata) for e in desk.of(JobFailed)] == [
        ("strict", "OUT_OF_MEMORY", (("free_bytes", "1"),))
    ]
    assert [e.job_id for e in desk.of(GenerationCompleted)] == ["fast"]
    desk.runner.memory_rows = 1
    desk.send(Submit(generation("alone"))).until(3)
    assert desk.of(JobFailed)[-1].job_id == "alone"


@pytest.mark.parametrize(
    ("errors", "reason"),
    [
        ([MemoryError()], ""),
        ([MemoryError(), MemoryError()], "OUT_OF_MEMORY"),
        ([ValueError()], "INTERNAL"),
    ],
)
def test_a_picture_that_has_no_memory_beside_others_is_decoded_alone(
    errors: list[Exception], reason: str
) -> None:
    desk = Desk()
    desk.runner.decode_errors = list(errors)
    desk.send(Submit(generation("a"))).until(1)
    assert [e.reason for e in desk.of(JobFailed)] == ([reason] if reason else [])
    assert len(desk.of(GenerationCompleted)) == (0 if reason else 1)
    decoded = [told for kind, told in desk.runner.log if kind == "decode"]
    assert decoded == [("a", False)] + ([("a", True)] if isinstance(errors[0], MemoryError) else [])
    assert desk.runner.progress == {}
    desk.send(Submit(generation("b"))).until(2)
    assert desk.of(GenerationCompleted)[-1].job_id == "b"


def test_what_fails_in_a_shared_forward_fails_alone() -> None:
    desk = Desk()
    desk.runner.odd = lambda job: job.id == "b"
    desk.send(*(Submit(generation(name, num_images=2)) for name in "abc")).until(3)
    assert [(e.job_id, e.reason) for e in desk.of(JobFailed)] == [("b", "INTERNAL")]
    assert {e.job_id for e in desk.of(GenerationCompleted)} == {"a", "c"}
    assert desk.runner.progress == {}


@pytest.mark.parametrize(
    ("error", "reason"), [(MemoryError(), "OUT_OF_MEMORY"), (RuntimeError("odd"), "INTERNAL")]
)
def test_a_failed_step_fails_its_requests_and_the_next_works(error: Exception, reason: str) -> None:
    desk = Desk()
    desk.runner.denoise_error = error
    desk.send(Submit(generation("a"))).until(1)
    assert desk.of(JobFailed)[0].reason == reason  # type: ignore[union-attr]
    desk.send(Submit(generation("b"))).until(2)
    assert [e.job_id for e in desk.of(GenerationCompleted)] == ["b"]


def test_positions_are_told_when_they_change() -> None:
    desk = Desk(slots=1)
    desk.send(*(Submit(generation(name, adapters=(use(name),))) for name in "abc")).until(3)
    assert [e.position for e in desk.of(Queued) if e.job_id == "c"] == [2, 1, 0]


def test_more_adapters_than_slots_take_turns() -> None:
    desk = Desk(slots=1)
    desk.send(*(Submit(generation(name, adapters=(use(name),))) for name in "ab")).until(2)
    assert [name for kind, name in desk.runner.log if kind == "load"] == ["a", "b"]
    assert desk.of(Sample).count(Sample("adapter_evictions_total", 1.0)) == 1


def test_a_training_publishes_and_completes() -> None:
    desk = Desk().send(Submit(training("otto-1", max_train_steps=5, checkpointing_steps=2))).until(1)
    assert desk.of(TrainingStarted) == [TrainingStarted("otto-1", 0)]
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [2, 4, 5]
    (end,) = desk.of(TrainingCompleted)
    assert (end.state, end.step) == (State.SUCCEEDED, 5)


def test_a_picture_of_usual_length_is_not_held_up_by_a_training() -> None:
    desk = Desk()
    desk.send(Submit(training("otto-1", max_train_steps=300)))
    while ("train", 7) not in desk.runner.log:
        desk.loop.turn()
    desk.send(Submit(generation("a", num_inference_steps=30))).until(1)
    kinds = [kind for kind, _ in desk.runner.log]
    first, last = kinds.index("denoise"), len(kinds) - kinds[::-1].index("denoise")
    assert kinds[first:last] == ["denoise"] * 30


def test_samples_are_painted_with_the_checkpoint_and_completion_waits_for_them() -> None:
    desk = Desk()
    desk.send(
        Submit(training("o-1", max_train_steps=2, checkpointing_steps=1, validation_prompts=("p", "q")))
    )
    desk.until(1)
    samples = [(e.step, e.index, e.prompt) for e in desk.of(SampleReady)]
    assert sorted(samples) == [(1, 0, "p"), (1, 1, "q"), (2, 0, "p"), (2, 1, "q")]
    assert isinstance(desk.events[-1], TrainingCompleted)
    assert not desk.of(GenerationCompleted, Progress, Queued, ImageReady)


def test_a_resumed_training_paints_the_samples_that_were_lost() -> None:
    desk = Desk()
    desk.send(Submit(training("o-1", resume_step=3, max_train_steps=3, validation_prompts=("p",)))).until(1)
    assert [(e.step, e.index) for e in desk.of(SampleReady)] == [(3, 0)]
    assert desk.of(TrainingStarted) == [TrainingStarted("o-1", 3)]


def test_a_sample_that_fails_is_a_warning() -> None:
    desk = Desk()
    desk.runner.missing = {"o"}
    desk.send(Submit(training("o-1", max_train_steps=1, validation_prompts=("p",)))).until(1)
    assert desk.of(TrainingWarning)[0].reason == "SAMPLE_FAILED"  # type: ignore[union-attr]
    assert desk.of(TrainingCompleted)[0].state is State.SUCCEEDED  # type: ignore[union-attr]


def test_pictures_are_painted_between_the_pieces_of_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRun, "pieces", 50)
    desk = Desk()
    desk.send(Submit(training("otto-1", max_train_steps=4, checkpointing_steps=2)))
    while not desk.runner.runs or desk.runner.runs["otto-1"].step < 2:
        desk.loop.turn()
    desk.send(Submit(generation("g1", num_inference_steps=3))).until(1)
    assert not desk.of(CheckpointPublished), "the picture came first"
    assert desk.runner.runs["otto-1"].step == 2, "no step is taken meanwhile"
    desk.until(2)
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [2, 4]


def test_a_training_that_is_cancelled_amid_a_checkpoint_publishes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeRun, "pieces", 50)
    desk = Desk()
    desk.send(Submit(training("otto-1", max_train_steps=9, checkpointing_steps=2)))
    while not desk.runner.runs or desk.runner.runs["otto-1"].step < 2:
        desk.loop.turn()
    desk.send(Cancel("otto-1")).until(1)
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [2]


def test_cancelling_a_training_keeps_what_it_has_learned() -> None:
    desk = Desk().send(Submit(training("otto-1", max_train_steps=500)))
    while ("train", 7) not in desk.runner.log:
        desk.loop.turn()
    desk.send(Cancel("otto-1")).until(1)
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [7]
    assert desk.of(TrainingCompleted)[0].state is State.CANCELLED  # type: ignore[union-attr]
    assert not desk.loop.scheduler.has_work


def test_a_nonfinite_loss_fails_the_training_and_keeps_its_checkpoints() -> None:
    desk = Desk()
    desk.runner.broken = {4: NonfiniteLoss("the loss is NaN at step 4", {"step": "4"})}
    desk.send(Submit(training("otto-1", max_train_steps=9, checkpointing_steps=2))).until(1)
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [2]
    assert desk.of(JobFailed) == [
        JobFailed("otto-1", "NONFINITE_LOSS", "the loss is NaN at step 4", (("step", "4"),))
    ]


def company(desk: Desk, *jobs: TrainingJob, rows: int = 2, bucket: int = 8) -> Desk:
    """These trainings, which may share micro-steps, all prepared."""
    desk.runner.place = Place("company", rows, bucket)
    desk.send(*(Submit(job) for job in jobs))
    while len(desk.of(TrainingStarted)) < len(jobs):
        desk.loop.turn()
    return desk


def together(desk: Desk) -> list[tuple[str, ...]]:
    return [names for kind, names in desk.runner.log if kind == "together"]  # type: ignore[misc]


def test_trainings_of_one_company_share_micro_steps_and_each_has_its_own_end() -> None:
    jobs = (training(f"{name}-1", max_train_steps=steps) for name, steps in (("a", 3), ("b", 9), ("c", 6)))
    desk = company(Desk(), *jobs).until(3)
    assert {"a-1", "b-1", "c-1"} in [set(names) for names in together(desk)]
    ends = [(e.job_id, e.step) for e in desk.of(TrainingCompleted)]  # type: ignore[union-attr]
    assert sorted(ends) == [("a-1", 3), ("b-1", 9), ("c-1", 6)]
    assert sum(len(names) for names in together(desk)) == 18, "nobody took a step too many"
    assert len(together(desk)) < 18


def test_what_fails_in_a_shared_micro_step_fails_alone() -> None:
    desk = company(Desk(), training("a-1", max_train_steps=9), training("b-1", max_train_steps=9))
    desk.runner.runs["a-1"].broken = {5: NonfiniteLoss("NaN at step 5", {"step": "5"})}
    desk.until(2)
    assert [(e.job_id, e.reason) for e in desk.of(JobFailed)] == [("a-1", "NONFINITE_LOSS")]
    assert [(e.job_id, e.step) for e in desk.of(TrainingCompleted)] == [("b-1", 9)]


def test_trainings_that_do_not_fit_the_memory_together_are_fewer_and_lose_nothing() -> None:
    desk = Desk()
    desk.runner.memory_trainings = 2
    company(desk, *(training(f"{name}-1", max_train_steps=6) for name in "abcd")).until(4)
    assert not desk.of(JobFailed)
    assert sum(len(names) for names in together(desk)) == 24
    assert {len(names) for names in together(desk)} <= {1, 2}
    told = desk.of(Sample).count(Sample("out_of_memory_total", 1.0, ("train",)))
    assert 1 <= told <= 2, "4 at once and 3 at once, never again"


def test_an_error_of_nobodys_own_is_found_by_halves() -> None:
    desk = company(Desk(), *(training(f"{name}-1", max_train_steps=4) for name in "abc"))
    train = desk.runner.train

    def odd(runs: Sequence[TrainingRun]) -> list[TrainOutcome]:
        if any(run is desk.runner.runs["b-1"] for run in runs):
            raise RuntimeError("odd")
        return train(runs)

    desk.runner.train = odd  # type: ignore[method-assign]
    desk.until(3)
    assert [(e.job_id, e.reason) for e in desk.of(JobFailed)] == [("b-1", "INTERNAL")]
    assert {e.job_id for e in desk.of(TrainingCompleted)} == {"a-1", "c-1"}


def test_a_step_of_several_micro_steps_is_told_once_and_never_cut() -> None:
    desk = Desk()
    desk.runner.micro_steps = 3
    desk.send(Submit(training("otto-1", max_train_steps=50)))
    while desk.runner.log.count(("together", ("otto-1",))) < 7:
        desk.loop.turn()
    assert desk.of(Sample).count(Sample("train_steps_total", 1.0)) == 2
    desk.send(Cancel("otto-1")).until(1)
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [3], "the third was finished first"


def test_a_paused_training_keeps_what_it_has_learned_and_leaves() -> None:
    desk = Desk().send(Submit(training("otto-1", max_train_steps=500)))
    while ("train", 7) not in desk.runner.log:
        desk.loop.turn()
    desk.send(Pause("otto-1"), Pause("unknown"))
    desk.loop.turn()
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [7]
    assert desk.of(TrainingPaused) == [TrainingPaused("otto-1", 7)]
    assert not desk.loop.scheduler.has_work
    assert not desk.loop.trainings.live
    desk.send(Submit(training("otto-1", resume_step=7, max_train_steps=9))).until(1)
    assert desk.of(TrainingCompleted)[0].step == 9  # type: ignore[union-attr]


def test_a_training_that_is_paused_while_it_prepares_has_nothing_to_keep() -> None:
    desk = Desk().send(Submit(training("otto-1")), Pause("otto-1"))
    desk.loop.turn()
    assert desk.of(TrainingPaused, CheckpointPublished) == [TrainingPaused("otto-1", 0)]


@pytest.mark.parametrize("how", ["a checkpoint", "a pause"])
def test_a_full_disk_pauses_a_training_at_its_last_checkpoint(how: str) -> None:
    desk = company(Desk(), training("a-1", max_train_steps=9, checkpointing_steps=2), training("b-1"))
    desk.runner.runs["a-1"].unwritten = {4 if how == "a checkpoint" else 3: StorageFull("no space left")}
    while ("train", 3) not in desk.runner.log or len(desk.of(CheckpointPublished)) < 1:
        desk.loop.turn()
    if how == "a pause":
        desk.send(Pause("a-1"))
    while not desk.of(TrainingPaused):
        desk.loop.turn()
    assert desk.of(TrainingPaused) == [TrainingPaused("a-1", 2, "STORAGE_FULL", "no space left")]
    assert not desk.of(JobFailed)
    assert set(desk.loop.trainings.live) == {"b-1"}


def test_a_training_that_is_submitted_twice_runs_once() -> None:
    job = training("otto-1", max_train_steps=500)
    desk = Desk().send(Submit(job), Submit(job))
    while ("train", 2) not in desk.runner.log:
        desk.loop.turn()
    desk.send(Cancel("otto-1")).until(1)
    assert len(desk.of(TrainingCompleted)) == 1
    assert not desk.loop.scheduler.has_work


def test_drain_finishes_pictures_and_keeps_trainings() -> None:
    desk = Desk().send(Submit(training("otto-1", max_train_steps=500)))
    while ("train", 3) not in desk.runner.log:
        desk.loop.turn()
    desk.send(Submit(generation("a")), Drain())
    desk.loop.run()
    assert [e.job_id for e in desk.of(GenerationCompleted)] == ["a"]
    assert [e.checkpoint.step for e in desk.of(CheckpointPublished)] == [3]
    assert not desk.of(TrainingCompleted)


def test_load_and_unload() -> None:
    desk = Desk()
    otto = use("otto")
    desk.send(LoadAdapter("1", otto), LoadAdapter("2", otto), UnloadAdapter("3", (otto.checkpoint,)))
    desk.loop.turn()
    assert desk.of(AdapterLoaded, AdaptersUnloaded) == [
        AdapterLoaded("1", True),
        AdapterLoaded("2", False),
        AdaptersUnloaded("3", 1),
    ]
    assert desk.runner.slots == {}


def test_a_pinned_adapter_keeps_its_slot_until_it_is_unloaded() -> None:
    desk = Desk(slots=4)
    otto = use("otto")
    desk.send(LoadAdapter("1", otto, pin=True))
    desk.loop.turn()
    names = ["a", "b", "c", "d", "e", "f"]
    desk.send(*(Submit(generation(name, adapters=(use(name),))) for name in names))
    desk.until(len(names))
    assert desk.loop.residency.slot(otto.checkpoint) is not None
    desk.send(UnloadAdapter("2", (otto.checkpoint,)))
    desk.loop.turn()
    assert desk.loop.residency.slot(otto.checkpoint) is None


def test_an_adapter_is_loaded_ahead_though_every_slot_is_in_use() -> None:
    desk = Desk(slots=4)
    names = ["a", "b", "c", "d"]
    desk.send(*(Submit(generation(name, adapters=(use(name),))) for name in names))
    desk.loop.turn()
    assert len(desk.runner.slots) == len(names)
    desk.send(LoadAdapter("1", use("otto")))
    desk.loop.turn()
    assert desk.of(AdapterLoaded, CallFailed) == [AdapterLoaded("1", True)]
    desk.until(len(names))
    assert {event.job_id for event in desk.of(GenerationCompleted)} == set(names)  # type: ignore[union-attr]


def test_an_adapter_in_use_is_unloaded_when_its_last_picture_is_done() -> None:
    desk = Desk().send(Submit(generation("a", adapters=(use("otto"),))))
    desk.loop.turn()
    desk.send(UnloadAdapter("1", (CheckpointId("otto", 1, 100),)))
    desk.loop.turn()
    assert len(desk.runner.slots) == 1
    desk.until(1)
    assert desk.runner.slots == {}


def test_a_call_that_fails_is_answered() -> None:
    desk = Desk()
    desk.runner.missing = {"otto"}
    desk.send(LoadAdapter("1", use("otto")), ImportAdapter("2", "f", "n", False, ImportTerms()))
    desk.loop.turn()
    assert desk.of(CallFailed)[0].reason == "ADAPTER_NOT_FOUND"  # type: ignore[union-attr]
    assert desk.of(AdapterImported) == [
        AdapterImported("2", CheckpointId("n", 1, 0), replace(REPORT, probe=0.5))
    ]
    assert desk.loop.residency.resident == ()


def test_a_large_import_keeps_nobody_waiting() -> None:
    """The import is not done before the picture is: in turn, they would wait for each other."""
    painted = threading.Event()

    class Slow(FakeRunner):
        def import_adapter(
            self, path: str, name: str, new_version: bool, terms: ImportTerms, on_device: OnDevice
        ) -> tuple[CheckpointId, AdapterReport]:
            assert painted.wait(30)
            return super().import_adapter(path, name, new_version, terms, on_device)

    events: list[Event] = []
    inbox: SimpleQueue[Message] = SimpleQueue()
    with ThreadPoolExecutor(1) as aside:
        loop = Loop(
            runner=Slow(),
            inbox=inbox,
            emit=events.append,
            slots=4,
            sample_defaults=SampleDefaults(64, 64, "ddim"),
            aside=aside,
        )
        inbox.put(ImportAdapter("1", "f", "n", False, ImportTerms()))
        inbox.put(Submit(generation("a")))
        while not any(isinstance(event, GenerationCompleted) for event in events):
            loop.turn()
        painted.set()
        loop.turn()  # what the import tries on the device
    assert isinstance(events[-1], AdapterImported)


def test_what_is_loaded_again_stays_though_it_was_to_go() -> None:
    """Unloaded while a picture uses it, then asked for again."""
    desk = Desk()
    otto = use("otto")
    desk.send(Submit(generation("a", adapters=(otto,), num_inference_steps=3)))
    desk.loop.turn()
    desk.send(UnloadAdapter("u", (otto.checkpoint,)), LoadAdapter("l", otto)).until(1)
    assert desk.loop.residency.resident == (otto.checkpoint,)


def test_a_call_that_has_no_memory_says_so() -> None:
    desk = Desk()

    def load(use: object, slot: int) -> str:
        raise MemoryError

    desk.runner.load = load  # type: ignore[method-assign, assignment]
    desk.send(LoadAdapter("l", use("otto"))).loop.turn()
    (failure,) = desk.of(CallFailed)
    assert (failure.call_id, failure.reason) == ("l", "OUT_OF_MEMORY")  # type: ignore[union-attr]
    assert desk.loop.residency.resident == ()
