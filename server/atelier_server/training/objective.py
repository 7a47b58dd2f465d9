"""What a training step measures: the base's own loss on the rows of a batch."""

from __future__ import annotations

from torch import Tensor

from atelier_server.core import Recipe
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.dataset import Batch


class Objective:
    """Mean squared error against what the base predicts, with Min-SNR weights if the recipe asks for them."""

    def __init__(self, recipe: Recipe, denoiser: Denoiser) -> None:
        self._recipe = recipe
        self._denoiser = denoiser

    def noisy(self, batch: Batch) -> Tensor:
        """What the U-Net is shown, [b,C,h,w]."""
        return self._denoiser.noisy(batch.latents, batch.noise, batch.timesteps)

    def loss(self, batch: Batch, prediction: Tensor) -> Tensor:
        """The mean over the rows, a scalar, of the U-Net's prediction [b,C,h,w]."""
        return self._denoiser.error(
            prediction, batch.latents, batch.noise, batch.timesteps, self._recipe.snr_gamma
        ).mean()
