"""A step that fails has not been taken: whatever the scheduler, pictures go on as if it had not been."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from atelier_server.core import SCHEDULERS, SchedulerOptions
from atelier_server.diffusion.schedulers import options_of
from atelier_server.diffusion.trajectory import Trajectory, all_or_none
from atelier_server.errors import InvalidRequest

SHAPE = (4, 8, 8)
CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "steps_offset": 1}


def picture(
    scheduler: str, seed: int = 1, *, steps: int = 6, prediction_type: str = "epsilon", **options: Any
) -> Trajectory:
    return Trajectory.begin(
        scheduler,
        {**CONFIG, "prediction_type": prediction_type},
        options=SchedulerOptions(**options),
        num_inference_steps=steps,
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
        if number < 4:
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


@pytest.mark.parametrize("scheduler", [name for name in SCHEDULERS if "use_beta_sigmas" in options_of(name)])
def test_timesteps_that_are_equal_are_walked_one_by_one(scheduler: str) -> None:
    one = picture(scheduler, steps=50, use_beta_sigmas=True)
    while not one.finished:
        step(one)
    assert bool(one.latents.isfinite().all())


ZERO_SNR = [name for name in SCHEDULERS if "rescale_betas_zero_snr" in options_of(name)]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scheduler", ZERO_SNR)
def test_noise_is_not_predicted_where_there_is_nothing_else(scheduler: str, prediction_type: str) -> None:
    spacing = {"timestep_spacing": "trailing"} if "timestep_spacing" in options_of(scheduler) else {}
    asked: dict[str, Any] = {"prediction_type": prediction_type, "rescale_betas_zero_snr": True, **spacing}
    if scheduler in ("ddim", "ddpm", "lcm", "tcd") and prediction_type == "epsilon":
        with pytest.raises(InvalidRequest, match="rescale_betas_zero_snr: the base predicts noise"):
            picture(scheduler, **asked)
        return
    one = picture(scheduler, **asked)
    while not one.finished:
        step(one)
    assert bool(one.latents.isfinite().all())


@pytest.mark.parametrize(
    ("scheduler", "steps", "near"), [("lcm", 60, 50), ("tcd", 51, 50), ("ddim", 1000, 999), ("pndm", 1, 4)]
)
def test_a_number_of_steps_that_would_do_is_named(scheduler: str, steps: int, near: int) -> None:
    with pytest.raises(
        InvalidRequest, match=f"num_inference_steps: {steps} do not suit {scheduler}; {near} would"
    ):
        picture(scheduler, steps=steps)
