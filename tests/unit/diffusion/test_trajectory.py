"""A step that fails has not been taken: whatever the scheduler, pictures go on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from atelier_server.core import SCHEDULERS, SchedulerOptions
from atelier_server.diffusion.trajectory import Trajectory, all_or_none

SHAPE = (4, 8, 8)
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "prediction_type": "epsilon"}


def picture(scheduler: str, seed: int) -> Trajectory:
    return Trajectory.begin(
        scheduler,
        CONFIG,
        options=SchedulerOptions(),
        num_inference_steps=6,
        seed=seed,
        shape=SHAPE,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )


def step(trajectory: Trajectory) -> None:
    trajectory.advance(trajectory.model_input().tanh())


def half_a_step(pictures: list[Trajectory], fail: Callable[[Trajectory], None]) -> None:
    with all_or_none(pictures):
        step(pictures[0])
        fail(pictures[1])


def fail_at_once(trajectory: Trajectory) -> None:
    raise MemoryError


def fail_in_the_middle(trajectory: Trajectory) -> None:
    trajectory.model_input()
    trajectory.advance(torch.ones(1, 4, 3, 5))  # does not fit the latents


@pytest.mark.parametrize("fail", [fail_at_once, fail_in_the_middle])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_pictures_of_a_step_that_failed_go_on_as_if_it_had_not_been(
    scheduler: str, fail: Callable[[Trajectory], None]
) -> None:
    pictures = [picture(scheduler, seed) for seed in (1, 2)]
    for number in range(len(pictures[0].timesteps)):
        if number in (0, 3):
            with pytest.raises((MemoryError, RuntimeError)):
                half_a_step(pictures, fail)
        for one in pictures:
            step(one)
    for seed, one in zip((1, 2), pictures, strict=True):
        undisturbed = picture(scheduler, seed)
        while not undisturbed.finished:
            step(undisturbed)
        assert one.finished
        assert torch.equal(one.latents, undisturbed.latents)
