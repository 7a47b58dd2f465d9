"""Captions of the class, and the rows that output preservation adds. Their losses are in tests/golden."""

from __future__ import annotations

import pytest
import torch

from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.batch import Batch
from atelier_server.training.objective import Objective, of_class
from tests.unit.training.test_batch import example

RECIPE = Recipe(
    "sks octopus",
    16,
    class_prompt="octopus",
    train_batch_size=2,
    with_prior_preservation=True,
    output_preservation_weight=0.5,
)


@pytest.mark.parametrize(
    ("caption", "told"),
    [
        ("sks octopus", "octopus"),
        ("a sks octopus in the snow", "a octopus in the snow"),
        ("sks octopus beside sks octopus", "octopus beside octopus"),
        ("a beach", "octopus"),
        (None, None),
    ],
)
def test_the_class_stands_for_the_subject(caption: str | None, told: str | None) -> None:
    assert of_class(caption, RECIPE) == told


def test_rows_that_teach_come_again_after_those_of_the_class(resident: tuple[BaseModel, object]) -> None:
    denoiser = Denoiser(resident[0].unet, resident[0].scheduler_config)
    shown = [example("a sks octopus"), example("sks octopus"), example("octopus"), example("octopus")]
    generator = torch.Generator().manual_seed(0)
    batch = Batch.draw(shown, 2, RECIPE, num_train_timesteps=1000, generator=generator)
    objective = Objective(RECIPE, denoiser)
    rows = objective.shown(batch)
    assert objective.rows == len(rows.latents) == 6
    assert rows.captions == ["a sks octopus", "sks octopus", "octopus", "octopus", "a octopus", "octopus"]
    for own in (rows.latents, rows.noise, rows.timesteps, objective.noisy(rows)):
        assert torch.equal(own[4:], own[:2])
    plain = Objective.plain(RECIPE, denoiser)
    assert plain.shown(batch) is batch
