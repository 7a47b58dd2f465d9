"""Class pictures: painted before a training begins, kept by the front, and never twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from atelier_server.core import State, TrainingJob
from atelier_server.engine.runner import Decoded
from atelier_server.engine.scheduler import ImageTask
from atelier_server.messages import (
    Cancel,
    ClassImageReady,
    Drain,
    JobFailed,
    Pause,
    Submit,
    TrainingCompleted,
    TrainingPaused,
    TrainingStarted,
)
from tests.fakes import training
from tests.unit.engine.test_loop import Desk


def taught(there: tuple[int, ...] = (), **changes: object) -> TrainingJob:
    job = training(
        "otto-1", max_train_steps=2, with_prior_preservation=True, class_prompt="octopus", num_class_images=5
    )
    job = replace(job, recipe=replace(job.recipe, **changes))  # type: ignore[arg-type]
    return replace(job, class_images=tuple((number, f"class/{number}.png") for number in there))


def turned(desk: Desk, kind: type) -> Desk:
    for _ in range(500):
        desk.loop.turn()
        if desk.of(kind):
            return desk
    raise AssertionError(desk.events)


def test_those_that_are_missing_are_painted_in_batches_and_the_training_leaves() -> None:
    desk = turned(Desk().send(Submit(taught((1, 3), seed=7))), TrainingPaused)
    told = {event.number: event.data for event in desk.of(ClassImageReady)}  # type: ignore[union-attr]
    assert told == {number: f"otto-1/class-{number}:0".encode() for number in (0, 2, 4)}
    batches = [names for kind, names in desk.runner.log if kind == "denoise"]
    assert {len(names) for names in batches} == {3}  # type: ignore[arg-type]
    assert desk.events[-1] == TrainingPaused("otto-1", 0)
    assert not desk.of(TrainingStarted, JobFailed)
    assert not desk.loop.trainings.has("otto-1")
    assert not desk.runner.runs


def test_a_training_that_has_them_begins() -> None:
    desk = Desk().send(Submit(taught((0, 1, 2, 3, 4)))).until(1)
    assert not desk.of(ClassImageReady)
    assert desk.of(TrainingStarted) == [TrainingStarted("otto-1", 0)]
    plain = Desk().send(Submit(taught(with_prior_preservation=False))).until(1)
    assert not plain.of(ClassImageReady)


def test_they_are_the_bases_own_of_seeds_of_their_own() -> None:
    desk = Desk().send(Submit(taught(seed=7, validation_steps=3)))
    desk.loop.turn()
    jobs = {task.job.id: task.job for task in desk.loop.scheduler.tasks}
    assert [jobs[f"otto-1/class-{number}"].seed for number in range(5)] == [7, 8, 9, 10, 11]
    for job in jobs.values():
        assert (job.prompt, job.adapters, job.num_inference_steps) == ("octopus", (), 3)


def test_a_cancelled_or_paused_one_paints_no_more() -> None:
    for command, end in (
        (Cancel("otto-1"), TrainingCompleted("otto-1", State.CANCELLED, 1, 0.0)),
        (Pause("otto-1"), TrainingPaused("otto-1", 1)),
    ):
        desk = Desk().send(Submit(replace(taught(), resume_step=1)))
        desk.loop.turn()
        assert desk.loop.trainings.has("otto-1")
        desk = turned(desk.send(command), type(end))
        assert desk.of(type(end)) == [end]
        assert not desk.loop.scheduler.has_work


def test_a_drain_leaves_them_for_the_next_worker() -> None:
    desk = Desk().send(Submit(taught()))
    desk.loop.turn()
    desk.send(Drain()).loop.run()
    assert not desk.of(TrainingPaused, TrainingCompleted, JobFailed)


def test_one_that_cannot_be_painted_fails_the_training() -> None:
    desk = Desk().send(Submit(taught()))
    desk.runner.odd = lambda job: True
    desk = turned(desk, JobFailed)
    (failure,) = desk.of(JobFailed)
    assert failure.job_id == "otto-1"  # type: ignore[union-attr]
    assert failure.message.startswith("a class picture could not be painted")  # type: ignore[union-attr]
    assert not desk.loop.scheduler.has_work
    assert not desk.loop.trainings.has("otto-1")


@pytest.mark.parametrize("left", [Pause("otto-1"), Cancel("otto-1")])
def test_a_late_decoding_is_not_taken_for_the_one_of_the_same_name(left: Pause | Cancel) -> None:
    """A training comes back while one of its class pictures is still being decoded."""
    desk = Desk()
    late: list[tuple[ImageTask, Callable[[Decoded], None]]] = []
    decode = desk.runner.decode

    def slowly(task: ImageTask, done: Callable[[Decoded], None], *, alone: bool = False) -> None:
        late.append((task, done))

    desk.runner.decode = slowly  # type: ignore[method-assign]
    desk.send(Submit(taught()))
    while not late:
        desk.loop.turn()
    desk.runner.decode = decode  # type: ignore[method-assign]
    desk.send(left, Submit(taught()))
    desk.loop.turn()
    for _, done in late:
        done(Decoded(b"of the first time"))
    desk = turned(desk, ClassImageReady)
    for _ in range(50):
        desk.send(Cancel("nobody")).loop.turn()
    told = [event.data for event in desk.of(ClassImageReady)]  # type: ignore[union-attr]
    assert b"of the first time" not in told
    assert len(told) == 5
