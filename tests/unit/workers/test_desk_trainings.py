"""The desk with a real trainer and a real store: a training that is paused, cancelled, drained or finds the
disk full leaves nothing behind on the device, and goes on to the bits of one that was left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from queue import SimpleQueue

import pytest

from atelier_server.adapters.store import ADAPTER_FILE
from atelier_server.core import CheckpointId, Recipe, State, TrainingImage, TrainingJob
from atelier_server.engine.loop import Loop, Message
from atelier_server.engine.samples import SampleDefaults
from atelier_server.messages import (
    Cancel,
    CheckpointPublished,
    Drain,
    Event,
    JobFailed,
    Pause,
    Sample,
    Submit,
    TrainingCompleted,
    TrainingPaused,
    WorkerSettings,
)
from atelier_server.training.checkpoint import write_state
from atelier_server.workers.runner import TorchRunner

STEPS = 5
OTTO = Path(__file__).parents[3] / "examples" / "otto"
IMAGES = tuple(TrainingImage(str(OTTO / f"0{number}.png"), "") for number in (1, 2, 3))
RECIPE = Recipe(
    instance_prompt="a sks octopus",
    resolution=64,
    max_train_steps=STEPS,
    checkpointing_steps=2,
    train_batch_size=1,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    rank=2,
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> TorchRunner:
    folder = tmp_path_factory.mktemp("data")
    return TorchRunner(WorkerSettings("pocket", "cpu", "float32", str(folder), 2, 1, 8, 0))


class Desk:
    """A loop over the runner, and the events that it has emitted."""

    def __init__(self, runner: TorchRunner) -> None:
        self.runner = runner
        self.inbox: SimpleQueue[Message] = SimpleQueue()
        self.events: list[Event] = []
        self.loop = Loop(
            runner=runner,
            inbox=self.inbox,
            emit=self.events.append,
            slots=2,
            sample_defaults=SampleDefaults(64, 64, "ddim"),
        )

    def of(self, *kinds: type[Event]) -> list[Event]:
        return [event for event in self.events if isinstance(event, kinds)]

    def until(self, done: Callable[[], object]) -> None:
        for _ in range(500):
            if done():
                return
            self.loop.turn()
        raise AssertionError(self.events)

    @property
    def micro_steps(self) -> int:
        return len([e for e in self.events if isinstance(e, Sample) and e.metric == "train_step_seconds"])


def begin(runner: TorchRunner, name: str) -> TrainingJob:
    runner.store.create_version(
        name=name, trigger="", base_model="pocket", base_sha256="", training=f"{name}-1", new_version=False
    )
    return TrainingJob(f"{name}-1", name, 1, RECIPE, IMAGES)


def finish(runner: TorchRunner, name: str) -> str:
    """Goes on from the last checkpoint to the end: the digest of what it has learned."""
    last = runner.store.last_checkpoint(name, 1)
    job = TrainingJob(f"{name}-1", name, 1, RECIPE, IMAGES, last.id.step if last else 0)
    desk = Desk(runner)
    desk.inbox.put(Submit(job))
    desk.until(lambda: desk.of(TrainingCompleted, TrainingPaused, JobFailed))
    (end,) = desk.of(TrainingCompleted, TrainingPaused, JobFailed)
    assert isinstance(end, TrainingCompleted)
    assert (end.state, end.step) == (State.SUCCEEDED, STEPS)
    return runner.store.published(CheckpointId(name, 1, STEPS)).sha256


@pytest.fixture(scope="module")
def undisturbed(runner: TorchRunner) -> str:
    begin(runner, "calm")
    return finish(runner, "calm")


@pytest.mark.parametrize(
    ("command", "micro_steps", "kept"),
    [("pause", 7, [2, 4]), ("cancel", 5, [2]), ("drain", 3, [2]), ("pause", 1, [])],
)
def test_what_leaves_in_the_midst_of_a_step_goes_on_to_the_same_bits(
    runner: TorchRunner, undisturbed: str, command: str, micro_steps: int, kept: list[int]
) -> None:
    """Odd numbers of micro-steps: a step of two is half done when it is told."""
    name = f"{command}-{micro_steps}"
    desk, job = Desk(runner), begin(runner, name)
    desk.inbox.put(Submit(job))
    desk.until(lambda: desk.micro_steps == micro_steps)
    desk.inbox.put({"pause": Pause(job.id), "cancel": Cancel(job.id), "drain": Drain()}[command])
    desk.loop.run() if command == "drain" else desk.loop.turn()
    assert not desk.loop.trainings.live
    assert runner._trainings.state_bytes == 0, "the device is free of it"
    told = [e.checkpoint.step for e in desk.of(CheckpointPublished) if isinstance(e, CheckpointPublished)]
    assert told == kept, "a step that has begun is finished if the one before it has to be kept"
    assert finish(runner, name) == undisturbed


def test_a_full_disk_leaves_the_checkpoint_before_and_loses_nothing(
    runner: TorchRunner, undisturbed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk, job, written = Desk(runner), begin(runner, "full"), count(1)

    def second_finds_no_room(tree: dict[str, object], folder: Path) -> None:
        if next(written) == 2:
            (folder / "training-state.json").symlink_to("/dev/full")  # the kernel's own ENOSPC
        write_state(tree, folder)

    with monkeypatch.context() as patch:
        patch.setattr("atelier_server.training.trainer.write_state", second_finds_no_room)
        desk.inbox.put(Submit(job))
        desk.until(lambda: desk.of(TrainingPaused, JobFailed, TrainingCompleted))
    (paused,) = desk.of(TrainingPaused, JobFailed, TrainingCompleted)
    assert isinstance(paused, TrainingPaused)
    assert (paused.step, paused.reason) == (2, "STORAGE_FULL")
    assert runner._trainings.state_bytes == 0
    (record,) = runner.store.version("full").checkpoints
    assert record.id.step == 2
    assert runner.store.file(record.id, ADAPTER_FILE).stat().st_size == record.size_bytes
    assert finish(runner, "full") == undisturbed
