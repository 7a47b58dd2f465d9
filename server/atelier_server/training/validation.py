"""The validation loss: pictures that no step sees, under the same noise at every checkpoint."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from atelier_server.core import Recipe
from atelier_server.training.batch import Batch
from atelier_server.training.dataset import Example

TIMESTEPS = 4  # a picture, evenly spread


def validation_batches(
    examples: Sequence[Example], rows: int, recipe: Recipe, num_train_timesteps: int
) -> list[Batch]:
    """All pictures at TIMESTEPS timesteps, in batches of at most `rows` rows of one size, on the CPU.

    Latents and noise are drawn from the seed alone: each batch is the same whenever it is asked for.
    """
    chance = torch.Generator().manual_seed(recipe.seed)
    spread = [int((index + 0.5) / TIMESTEPS * num_train_timesteps) for index in range(TIMESTEPS)]
    still = Recipe(recipe.instance_prompt, recipe.resolution)  # no offset, no dropout
    batches = []
    for size in sorted({example.size for example in examples}):
        pairs = [(e, timestep) for e in examples if e.size == size for timestep in spread]
        for begin in range(0, len(pairs), rows):
            some = pairs[begin : begin + rows]
            drawn = Batch.draw(
                [example for example, _ in some],
                len(some),
                still,
                num_train_timesteps=num_train_timesteps,
                generator=chance,
            )
            batches.append(drawn.at(torch.tensor([timestep for _, timestep in some])))
    return batches
