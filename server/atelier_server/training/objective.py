"""What a training step shows the U-Net, and what it measures of the answer.

The first rows teach; with prior preservation as many follow that show the class (arXiv 2208.12242, section
3.2); with output preservation those that teach come again, under captions of the class, and the base's own
answer to them is what they should be.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from atelier_server.core import Recipe
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.batch import Batch


class Objective:
    """Mean squared errors, as diffusers' DreamBooth scripts sum them, and their knobs."""

    def __init__(self, recipe: Recipe, denoiser: Denoiser) -> None:
        self._recipe = recipe
        self._denoiser = denoiser

    @classmethod
    def plain(cls, recipe: Recipe, denoiser: Denoiser) -> Objective:
        """Nothing but the error: for a validation loss that recipes can be compared by."""
        return cls(replace(recipe, output_preservation_weight=0.0, snr_gamma=None), denoiser)

    @property
    def preserves_output(self) -> bool:
        return self._recipe.output_preservation_weight > 0

    @property
    def rows(self) -> int:
        """Of a micro-step."""
        return self._recipe.rows

    def shown(self, batch: Batch) -> Batch:
        """The batch with the rows that it needs besides."""
        if not self.preserves_output:
            return batch
        captions = [of_class(caption, self._recipe) for caption in batch.captions[: batch.instances]]
        return batch.with_rows(batch.instances, captions)

    def noisy(self, batch: Batch) -> Tensor:
        """What the U-Net sees, [b,C,h,w]."""
        return self._denoiser.noisy(batch.latents, batch.noise, batch.timesteps)

    def loss(self, batch: Batch, kept: Tensor | None, prediction: Tensor) -> Tensor:
        """A scalar, of the U-Net's prediction [b,C,h,w] for the rows of `shown`.

        `kept` [instances,C,h,w] is the base's prediction for the last rows. Min-SNR weights are those of the
        rows that teach, as in diffusers' scripts.
        """
        recipe, instances = self._recipe, batch.instances
        kept_rows = 0 if kept is None else len(kept)
        loss = self._error(batch, prediction, slice(0, instances), recipe.snr_gamma)
        if len(prediction) - kept_rows > instances:
            of_class = slice(instances, len(prediction) - kept_rows)
            loss = loss + recipe.prior_loss_weight * self._error(batch, prediction, of_class)
        if kept is not None:
            drift = F.mse_loss(prediction[-kept_rows:].float(), kept.float())
            loss = loss + recipe.output_preservation_weight * drift
        return loss

    def _error(self, batch: Batch, prediction: Tensor, rows: slice, snr_gamma: float | None = None) -> Tensor:
        """The mean over these rows."""
        return self._denoiser.error(
            prediction[rows],
            batch.latents[rows],
            batch.noise[rows],
            batch.timesteps[rows],
            snr_gamma=snr_gamma,
            masks=None if batch.masks is None else batch.masks[rows],
        ).mean()


def of_class(caption: str | None, recipe: Recipe) -> str | None:
    """A caption with the class in place of the subject; one that does not name the subject becomes the class.

    Were such a caption kept as it is, the training would be asked for two answers to it.
    """
    if caption is None:
        return None
    told = caption.replace(recipe.instance_prompt, recipe.class_prompt)
    return told if told != caption else recipe.class_prompt
