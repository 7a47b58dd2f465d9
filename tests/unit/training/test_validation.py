"""The rows of the validation loss: the same at every checkpoint, evenly over the timesteps."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import torch

from atelier_server.core import Recipe
from atelier_server.training.validation import TIMESTEPS, validation_batches
from tests.unit.training.test_batch import examples

RECIPE = Recipe("otto", 16, noise_offset=0.5, caption_dropout=0.9, seed=3)


def test_every_picture_has_every_timestep_once_and_no_knob_of_the_training() -> None:
    held = examples((16, 16), (16, 16), (16, 16), (32, 8))
    batches = validation_batches(held, 5, RECIPE, 1000)
    seen: Counter[tuple[str | None, int]] = Counter()
    for batch in batches:
        assert len(batch.latents) == batch.instances <= 5
        seen.update(zip(batch.captions, batch.timesteps.tolist(), strict=True))
    assert seen == {(name, at): 1 for name in "0123" for at in (125, 375, 625, 875)}
    assert len(batches) == 4  # 12 rows of one size in three, 4 of the other in one
    noise = torch.cat([batch.noise.flatten() for batch in batches])
    assert 0.9 < float(noise.std()) < 1.1  # without an offset


def test_they_follow_from_the_seed_alone() -> None:
    held = examples((16, 16), (32, 8))
    first, again = (validation_batches(held, 2, RECIPE, 1000) for _ in range(2))
    (other, *_) = validation_batches(held, 2, replace(RECIPE, seed=4), 1000)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.noise, two.noise)
        assert torch.equal(one.latents, two.latents)
    assert not torch.equal(first[0].noise, other.noise)
    assert len(first) == TIMESTEPS
