"""Who is on the device with whom: by number, memory, priority and age; suspects alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atelier_server.core import BaseInfo, Costs, Priority, Recipe, State
from atelier_server.errors import OutOfMemory
from atelier_server.jobs.records import TrainingRecord
from atelier_server.jobs.training_admission import Admission
from atelier_server.jobs.training_memory import base_bytes, demand
from atelier_server.jobs.training_run import Run
from tests.contract.fake_worker import BASE

RECIPE = Recipe(instance_prompt="a sks", resolution=512)
SD15 = replace(BASE, num_parameters=1_066_000_000, dtype="float16")
GIB = 2**30


def run(number: int, recipe: Recipe = RECIPE, *, crashes: int = 0, state: State = State.QUEUED) -> Run:
    record = TrainingRecord(
        f"t{number}", "", "", "", f"a{number}", 1, False, recipe, (), 0.0, state, crash_count=crashes
    )
    return Run(replace(record, number=number), lambda _run, _event: None)


def admission(most: int = 16, free: int = 80 * GIB, base: BaseInfo = SD15) -> Admission:
    return Admission(most, lambda: base, lambda: Costs(free_bytes=free))


def admitted(desk: Admission, runs: list[Run]) -> list[str]:
    names = []
    while (found := desk.next(runs)) is not None:
        found.submitted = True
        names.append(found.id)
    return names


def test_the_highest_priority_goes_first_and_then_the_oldest() -> None:
    runs = [run(3), run(1), run(2, replace(RECIPE, priority=Priority.HIGH)), run(4, state=State.PAUSED)]
    assert admitted(admission(), runs) == ["t2", "t1", "t3"]


def test_no_more_than_so_many_are_there() -> None:
    runs = [run(number) for number in range(5)]
    desk = admission(most=2)
    assert admitted(desk, runs) == ["t0", "t1"]
    assert admitted(desk, runs[1:]) == ["t2"]


def test_steps_take_turns_so_that_only_the_largest_counts() -> None:
    one = demand(RECIPE, SD15, Costs())
    runs = [run(number) for number in range(9)]
    assert len(admitted(admission(free=4 * one.state + one.step), runs)) == 4


def test_a_large_one_is_not_overtaken_by_small_ones_for_ever() -> None:
    large = replace(RECIPE, method="dreambooth")
    needed = demand(large, SD15, Costs())
    runs = [run(1), run(2, large), run(3)]
    desk = admission(free=needed.total)
    assert admitted(desk, runs) == ["t1"]
    assert admitted(desk, runs[1:]) == ["t2"]
    assert admitted(desk, runs[2:]) == ["t3"]


def test_one_that_can_never_fit_is_refused_with_both_figures() -> None:
    with pytest.raises(OutOfMemory) as caught:
        admission(free=10 * GIB).check(replace(RECIPE, method="dreambooth"))
    assert caught.value.metadata["free_bytes"] == str(10 * GIB)
    assert int(caught.value.metadata["needed_bytes"]) > 10 * GIB
    admission(free=10 * GIB).check(RECIPE)
    admission(free=0).check(RECIPE)  # nobody knows


def test_suspects_are_alone_and_first() -> None:
    runs = [run(1), run(2, crashes=2), run(3, crashes=2)]
    desk = admission()
    assert admitted(desk, runs) == ["t2"]
    runs[1].suspect = False
    assert admitted(desk, runs) == [], "the other suspect waits until it is alone"
    runs[1].submitted = False
    assert admitted(desk, runs) == ["t3"]
    assert admitted(desk, runs[:2]) == ["t1", "t2"]


@given(st.lists(st.tuples(st.integers(1, 64), st.sampled_from(Priority)), max_size=8), st.integers(1, 4))
def test_everybody_has_a_turn_and_the_memory_is_never_exceeded(
    wanted: list[tuple[int, Priority]], most: int
) -> None:
    recipes = [replace(RECIPE, rank=rank, priority=priority) for rank, priority in wanted]
    room = 9 * GIB
    desk, runs = admission(most, room), [run(number, recipe) for number, recipe in enumerate(recipes)]
    for _ in recipes:
        admitted(desk, runs)
        there = [demand(run.recipe, SD15, Costs()) for run in runs if run.submitted]
        assert 1 <= len(there) <= most
        if len(there) > 1:
            assert sum(d.state for d in there) + max(d.step for d in there) <= room
        runs.remove(next(run for run in runs if run.submitted))
    assert not runs


def test_the_estimate_is_of_the_right_size() -> None:
    """Stable Diffusion 1.5 at 512 pixels, rank 16, one picture a step: 8 GB cards do it."""
    recipe = replace(RECIPE, rank=16, train_batch_size=1)
    lora = base_bytes(SD15) + demand(recipe, SD15, Costs()).total
    assert 4e9 < lora < 8e9
    assert demand(replace(recipe, gradient_checkpointing=True), SD15, Costs()).step * 4 == pytest.approx(
        demand(recipe, SD15, Costs()).step, rel=0.01
    )
    whole = demand(replace(recipe, method="dreambooth"), SD15, Costs()).state
    assert whole == pytest.approx(0.86e9 * 16, rel=0.05), "the U-Net's weights, gradients and two moments"
    assert demand(replace(recipe, method="textual_inversion"), SD15, Costs()).state == 0
    assert demand(replace(recipe, use_ema=True), SD15, Costs()).state > demand(recipe, SD15, Costs()).state


def test_a_step_is_never_guessed_below_what_was_measured() -> None:
    measured = Costs(row_pixel_bytes=1e6)
    assert demand(RECIPE, SD15, measured).step == measured.forward_bytes(4, 512, 512)
