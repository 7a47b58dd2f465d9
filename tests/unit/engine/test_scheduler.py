"""What runs next: buckets, lanes, slots, and training's place between pictures."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from atelier_server.core import ROW_BUCKETS, GenerationJob, Mode
from atelier_server.engine.residency import Residency
from atelier_server.engine.scheduler import DenoiseBatch, Scheduler, TrainStep
from tests.fakes import generation, use


def scheduler(slots: int = 8) -> Scheduler:
    return Scheduler(Residency(slots))


def batch(desk: Scheduler) -> DenoiseBatch:
    step = desk.schedule()
    assert isinstance(step, DenoiseBatch)
    return step


def jobs(step: DenoiseBatch) -> list[str]:
    return [task.job.id for task in step.tasks]


def test_fast_takes_the_smallest_bucket_that_holds_the_batch() -> None:
    for images, bucket in ((1, 2), (2, 4), (3, 8), (4, 8), (5, 16), (8, 16), (20, 16)):
        desk = scheduler()
        desk.submit(generation("a", num_images=images))
        step = batch(desk)
        assert step.bucket == bucket
        assert len(step.tasks) == min(images, 8)


def test_an_unguided_picture_is_one_row() -> None:
    desk = scheduler()
    desk.submit(generation("a", num_images=20, guidance_scale=1.0))
    assert len(batch(desk).tasks) == 16


def test_strict_runs_in_its_bucket_only_and_fast_pictures_fill_it() -> None:
    desk = scheduler()
    desk.submit(generation("fast", num_images=2))
    desk.submit(generation("strict", mode=Mode.STRICT, bucket=8))
    first, second = batch(desk), batch(desk)
    assert (jobs(first), first.bucket) == (["fast", "fast"], 4)
    assert (jobs(second), second.bucket) == (["strict", "fast", "fast"], 8)


def test_sizes_take_turns() -> None:
    desk = scheduler()
    desk.submit(generation("small"))
    desk.submit(generation("large", width=128))
    assert [jobs(batch(desk)) for _ in range(4)] == [["small"], ["large"], ["small"], ["large"]]


def test_a_request_that_wants_to_be_alone_is() -> None:
    desk = scheduler()
    desk.submit(generation("a"))
    desk.submit(generation("b", alone=True, num_images=2))
    desk.submit(generation("c"))
    assert [jobs(batch(desk)) for _ in range(2)] == [["a", "c"], ["b", "b"]]


def test_a_batch_never_needs_more_adapters_than_there_are_slots() -> None:
    desk = scheduler(slots=2)
    for name in "abcd":
        desk.submit(generation(name, adapters=(use(name),)))
    desk.submit(generation("none"))
    assert jobs(batch(desk)) == ["a", "b", "none"]


def test_one_training_step_between_two_denoise_steps() -> None:
    desk = scheduler()
    desk.submit_training("t1")
    desk.submit_training("t2")
    assert [desk.schedule(), desk.schedule()] == [TrainStep("t1"), TrainStep("t2")]
    desk.submit(generation("a"))
    kinds = [type(desk.schedule()) for _ in range(6)]
    assert kinds == [DenoiseBatch, TrainStep] * 3
    desk.remove_training("t1")
    desk.remove_training("t2")
    assert [type(desk.schedule()) for _ in range(2)] == [DenoiseBatch] * 2


def test_waiting_jobs_are_those_of_which_nothing_has_started() -> None:
    desk = scheduler()
    tasks = desk.submit(generation("a", num_images=2))
    desk.submit(generation("b"))
    tasks[1].started = True
    assert list(desk.waiting_jobs()) == ["b"]


JOBS = st.builds(
    lambda guided, images, wide, strict, alone, adapter: {
        "guidance_scale": 5.0 if guided else 1.0,
        "num_images": images,
        "width": 128 if wide else 64,
        "mode": Mode.STRICT if strict else Mode.FAST,
        "bucket": strict,
        "alone": alone,
        "adapters": (use(f"a{adapter}"),) if adapter else (),
    },
    st.booleans(), st.integers(1, 6), st.booleans(), st.sampled_from([0, 0, 2, 8, 16]), st.booleans(),
    st.integers(0, 4),
)  # fmt: skip


@given(st.lists(JOBS, max_size=8), st.integers(1, 3))
def test_everything_is_served_and_every_batch_is_legal(requests: list[dict[str, object]], slots: int) -> None:
    desk = scheduler(slots)
    for number, fields in enumerate(requests):
        desk.submit(generation(f"j{number}", **fields))  # type: ignore[arg-type]
    left = {(task.job.id, task.index): 3 for task in desk.tasks}
    for _ in range(3 * len(left) + 1):
        step = desk.schedule()
        if step is None:
            break
        assert isinstance(step, DenoiseBatch)
        _assert_legal(step, slots)
        for task in step.tasks:
            left[task.job.id, task.index] -= 1
        desk.remove([task for task in step.tasks if left[task.job.id, task.index] == 0])
    assert not any(left.values())
    assert not desk.has_work


def _assert_legal(step: DenoiseBatch, slots: int) -> None:
    assert step.tasks
    assert step.bucket in ROW_BUCKETS
    assert sum(task.rows for task in step.tasks) <= step.bucket
    assert len({(task.job.width, task.job.height) for task in step.tasks}) == 1
    assert len(frozenset().union(*(task.checkpoints for task in step.tasks))) <= slots
    strict: list[GenerationJob] = [task.job for task in step.tasks if task.job.mode is Mode.STRICT]
    assert all(job.bucket == step.bucket for job in strict)
    if any(task.job.alone for task in step.tasks):
        assert len({task.job.id for task in step.tasks}) == 1
