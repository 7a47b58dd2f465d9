"""What runs next: buckets, lanes, slots, and training's place between pictures."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.core import ROW_BUCKETS, GenerationJob, Mode, Priority
from atelier_server.engine.residency import Residency
from atelier_server.engine.scheduler import DenoiseBatch, Scheduler, TrainStep
from atelier_server.engine.shares import Shares
from atelier_server.engine.training_share import PATIENCE, STRETCH
from tests.fakes import generation, use


def scheduler(slots: int = 8) -> Scheduler:
    return Scheduler(Residency(slots), training_share=0.5)


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


def test_sizes_take_turns_by_what_they_cost() -> None:
    desk = scheduler()
    desk.submit(generation("small"))
    desk.submit(generation("large", width=128))
    turns = [jobs(batch(desk))[0] for _ in range(9)]
    assert turns[:2] == ["small", "large"]
    assert turns.count("small") == 2 * turns.count("large")


def test_a_new_size_does_not_wait_for_the_past_of_another() -> None:
    desk = scheduler()
    desk.submit(generation("old"))
    for _ in range(100):
        batch(desk)
    desk.submit(generation("new", width=128))
    turns = [jobs(batch(desk))[0] for _ in range(6)]
    assert turns.count("new") == 2


def test_clients_share_the_rows_of_a_forward() -> None:
    desk = scheduler()
    desk.submit(generation("many", num_images=20, client="a"))
    desk.submit(generation("one", client="b"))
    desk.submit(generation("two", num_images=2, client="b"))
    assert sorted(jobs(batch(desk))) == ["many"] * 5 + ["one", "two", "two"]


def test_a_client_of_many_sizes_has_no_more_than_one_of_few() -> None:
    desk = scheduler()
    for number in range(9):
        desk.submit(generation(f"a{number}", width=64 + 8 * number, client="a"))
    desk.submit(generation("b", client="b"))
    spent: Counter[str] = Counter()
    for _ in range(200):
        step = batch(desk)
        for task in step.tasks:
            spent[task.job.client] += task.rows * task.job.width * task.job.height
    assert spent["a"] == pytest.approx(spent["b"], rel=0.05)


def test_a_small_size_of_a_client_takes_turns_with_a_large_one_of_his() -> None:
    """Also where the small one is everybody's, and its forwards are full."""
    desk = scheduler()
    for client in "abcdefghij":
        desk.submit(generation(client, client=client))
    desk.submit(generation("large", width=128, client="a"))
    seen = Counter(name for _ in range(60) for name in jobs(batch(desk)))
    assert seen["large"] > 0
    assert min(seen.values()) * 6 > max(seen.values())


def test_a_higher_priority_gets_more_and_a_lower_one_does_not_starve() -> None:
    desk = scheduler()
    for name, priority in (("low", Priority.LOW), ("normal", Priority.NORMAL), ("high", Priority.HIGH)):
        desk.submit(generation(name, num_images=16, priority=priority))
    shares = Counter(name for _ in range(21) for name in jobs(batch(desk)))
    assert shares["high"] == 4 * shares["normal"] == 16 * shares["low"] > 0


def test_a_forward_that_ran_out_of_memory_is_tried_again_smaller() -> None:
    desk = scheduler()
    desk.submit(generation("a", num_images=20))
    buckets = []
    while desk.shrink(step := batch(desk)):
        buckets.append(step.bucket)
    assert (buckets, step.bucket, len(step.tasks)) == ([16, 8, 4], 2, 1)
    desk.submit(generation("b", num_images=20, width=128))
    assert max(batch(desk).bucket for _ in range(2)) == 16, "another size is another question"


def test_a_strict_forward_cannot_be_made_smaller() -> None:
    desk = scheduler()
    desk.submit(generation("strict", mode=Mode.STRICT, bucket=8))
    desk.submit(generation("fast"))
    assert not desk.shrink(batch(desk))


def test_requests_whose_forward_failed_are_alone_from_then_on() -> None:
    desk = scheduler()
    for name in "ab":
        desk.submit(generation(name, num_images=3))
    assert desk.part(shared := batch(desk))
    assert len(set(jobs(shared))) == 2
    desk.submit(generation("c"))
    apart = [batch(desk) for _ in range(6)]
    assert {frozenset(jobs(one)) for one in apart} == {frozenset("a"), frozenset("b"), frozenset("c")}
    assert not any(desk.part(one) for one in apart)


def test_a_forward_has_no_more_rows_than_fit_the_memory() -> None:
    desk = Scheduler(Residency(8), row_limit=lambda width, height: 64 * 64 * 7 // (width * height))
    desk.submit(generation("a", num_images=20))
    desk.submit(generation("b", num_images=20, width=128, height=128))
    assert {batch(desk).bucket for _ in range(4)} == {4, 2}


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


def test_a_picture_that_would_never_fit_beside_pins_goes_before_one() -> None:
    residency = Residency(2)
    desk = Scheduler(residency)
    for name in "xy":
        residency.acquire(use(name).checkpoint, frozenset())
        residency.pin(use(name).checkpoint)
    desk.submit(generation("a", adapters=(use("a"),)))
    desk.submit(generation("wide", width=128))
    assert {name for _ in range(4) for name in jobs(batch(desk))} == {"a", "wide"}
    mine = frozenset({use("a").checkpoint})
    residency.acquire(use("a").checkpoint, mine)
    assert residency.resident == (use("y").checkpoint, use("a").checkpoint)


def test_shares_are_fair_whoever_comes_and_goes() -> None:
    shares: Shares[str] = Shares()
    shares.present(["a"])
    shares.charge("a", 100)
    shares.present(["a", "b"])
    assert (shares["a"], shares["b"]) == (100, 100), "b has no credit for the time before it came"
    shares.charge("b", 1)
    shares.present(["b"])
    shares.present(["a", "b"])
    assert shares["a"] == shares["b"] == 101


def run(desk: Scheduler, costs: dict[type[object], float], steps: int) -> list[type[object]]:
    """The kinds of the next steps, each of which takes what it costs."""
    kinds: list[type[object]] = []
    for _ in range(steps):
        step = desk.schedule()
        assert step is not None
        kinds.append(type(step))
        desk.spent(step, costs[type(step)])
    return kinds


def intervals(kinds: list[type[object]], costs: dict[type[object], float]) -> list[float]:
    """Seconds from the end of one denoise step to the end of the next."""
    ends = [sum(costs[k] for k in kinds[: i + 1]) for i, kind in enumerate(kinds) if kind is DenoiseBatch]
    return [later - earlier for earlier, later in pairwise(ends)]


def test_trainings_take_turns_while_nobody_waits_for_a_picture() -> None:
    desk = scheduler()
    desk.submit_training("t1")
    desk.submit_training("t2")
    for turn in ("t1", "t2", "t1"):
        step = desk.schedule()
        assert step == TrainStep((turn,))
        desk.spent(step, 1.0)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("micro_step", [0.03, 0.7, 5.0])
def test_trainings_get_their_share_and_the_usual_interval_stays_as_it_was(
    share: float, micro_step: float
) -> None:
    desk = Scheduler(Residency(8), training_share=share)
    desk.submit(generation("a", num_images=8))
    desk.submit_training("t")
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: micro_step}
    cycle = PATIENCE * (1 + share / (1 - share) / micro_step)  # of steps
    kinds = run(desk, costs, int(8 * cycle))
    trained = kinds.count(TrainStep) * micro_step
    assert trained / (trained + kinds.count(DenoiseBatch)) == pytest.approx(share, abs=0.04)
    longer = [seconds for seconds in intervals(kinds, costs) if seconds > 1.0 + STRETCH + 1e-6]
    assert len(longer) <= kinds.count(DenoiseBatch) / PATIENCE
    ordered = sorted(intervals(kinds, costs))
    assert ordered[int(0.95 * len(ordered))] <= 1.3


def test_short_micro_steps_are_spread_and_nobody_waits_for_a_piece() -> None:
    desk = Scheduler(Residency(8), training_share=0.2)  # a quarter of what pictures take: it fits in between
    desk.submit(generation("a"))
    desk.submit_training("t")
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: 0.05}
    run(desk, costs, 20 * PATIENCE)  # the first micro-step, whose length nobody knows, waits longest
    kinds = run(desk, costs, 20 * PATIENCE)
    assert max(intervals(kinds, costs)) <= 1.0 + STRETCH + 1e-6
    trained = kinds.count(TrainStep) * costs[TrainStep]
    assert trained / (trained + kinds.count(DenoiseBatch)) == pytest.approx(0.2, abs=0.02)


def test_a_share_of_nothing_leaves_trainings_what_pictures_do_not_want() -> None:
    desk = Scheduler(Residency(8), training_share=0.0)
    desk.submit_training("t")
    tasks = desk.submit(generation("a"))
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: 1.0}
    assert set(run(desk, costs, 200)) == {DenoiseBatch}
    desk.remove(tasks)
    assert run(desk, costs, 3) == [TrainStep] * 3


def test_what_trainings_do_while_the_device_is_idle_is_not_held_against_them() -> None:
    desk = scheduler()
    desk.submit_training("t")
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: 1.0}
    run(desk, costs, 1000)
    desk.submit(generation("a"))
    kinds = run(desk, costs, 4 * PATIENCE)
    assert kinds == ([DenoiseBatch] * PATIENCE + [TrainStep] * PATIENCE) * 2


def test_requests_one_after_another_do_not_starve_a_training() -> None:
    """Each is shorter than a training's patience, and the device is idle for a moment in between."""
    desk = scheduler()
    desk.submit_training("t")
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: 1.0}
    kinds: list[type[object]] = []
    for number in range(60):
        tasks = desk.submit(generation(f"g{number}"))
        painted = 0
        while painted < 10:
            kinds += run(desk, costs, 1)
            painted += kinds[-1] is DenoiseBatch
        desk.remove(tasks)
        kinds += run(desk, costs, 1)
    assert kinds.count(TrainStep) / len(kinds) == pytest.approx(0.5, abs=0.05)


def test_a_training_that_leaves_takes_what_it_was_owed_with_it() -> None:
    desk = scheduler()
    desk.submit(generation("a"))
    desk.submit_training("t")
    costs: dict[type[object], float] = {DenoiseBatch: 1.0, TrainStep: 1.0}
    run(desk, costs, PATIENCE - 1)
    desk.remove_training("t")
    desk.submit_training("u")
    assert run(desk, costs, PATIENCE) == [DenoiseBatch] * PATIENCE


def test_waiting_jobs_are_those_of_which_nothing_has_started() -> None:
    desk = scheduler()
    tasks = desk.submit(generation("a", num_images=2))
    desk.submit(generation("b"))
    tasks[1].started = True
    assert list(desk.waiting_jobs()) == ["b"]


JOBS = st.builds(
    lambda guided, images, wide, strict, alone, adapter, client, priority: {
        "guidance_scale": 5.0 if guided else 1.0,
        "num_images": images,
        "width": 128 if wide else 64,
        "mode": Mode.STRICT if strict else Mode.FAST,
        "bucket": strict,
        "alone": alone,
        "adapters": (use(f"a{adapter}"),) if adapter else (),
        "client": client,
        "priority": priority,
    },
    st.booleans(), st.integers(1, 6), st.booleans(), st.sampled_from([0, 0, 2, 8, 16]), st.booleans(),
    st.integers(0, 4), st.sampled_from("ab"), st.sampled_from(Priority),
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
