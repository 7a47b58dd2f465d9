"""What a picture is going to be, guessed from any step: its clean latents, and their colours at a glance."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier_server.diffusion.base import BaseModel

_CHART_PIXELS = 256
# Softer than a picture's edges: what a VAE makes of an edge is not a matter of one latent's colour.
_PATCH_LATENTS = 8
# Below this share of signal a noise prediction says nothing of the picture.
_LEAST_SIGNAL = 1e-4


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """A step as the U-Net has seen it: its input [1, C, h, w], the timestep, its (guided) prediction."""

    model_input: Tensor
    timestep: Tensor
    prediction: Tensor

    def clean(self, alphas_cumprod: Tensor, prediction_type: str) -> Tensor:
        """The clean latents [C, h, w] that the prediction amounts to.

        Every scheduler shows the U-Net sqrt(a) x0 + sqrt(1 - a) noise, however it scales its own latents; so
        one formula does for all, with a between two timesteps by its logarithmic signal-to-noise ratio.
        """
        signal = _share(alphas_cumprod, float(self.timestep))
        alpha, sigma = signal**0.5, (1 - signal) ** 0.5
        sample, prediction = self.model_input[0].float(), self.prediction[0].float()
        clean: Tensor = {
            "sample": prediction,
            "v_prediction": alpha * sample - sigma * prediction,
            "epsilon": (sample - sigma * prediction) / alpha,
        }[prediction_type]
        return clean


def _share(alphas_cumprod: Tensor, timestep: float) -> float:
    """a at a timestep, which may lie between two."""
    ratio = torch.logit(alphas_cumprod.double().clamp(_LEAST_SIGNAL, 1 - _LEAST_SIGNAL))
    low = min(max(int(timestep), 0), len(ratio) - 1)
    high = min(low + 1, len(ratio) - 1)
    return float(torch.sigmoid(torch.lerp(ratio[low], ratio[high], timestep - low)))


class LatentColours:
    """Colours as a linear function of latents: `weights` [C + 1, 3], the last row for a constant 1."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights

    @classmethod
    @torch.no_grad()
    def fit(cls, base: BaseModel) -> LatentColours:
        """By least squares over what the VAE itself makes of a chart of soft random colours."""
        scale = base.latent_scale
        side = min(base.native_width, base.native_height, _CHART_PIXELS) // scale * scale
        generator = torch.Generator().manual_seed(0)
        patches_across = max(side // scale // _PATCH_LATENTS, 2) + 1
        patches = torch.rand((1, 3, patches_across, patches_across), generator=generator)
        chart = F.interpolate(patches, size=(side, side), mode="bilinear")
        latents = base.encode_image(chart[0] * 2 - 1)[0].float().cpu()
        colours = F.avg_pool2d(chart, scale)[0].flatten(1).T
        found = torch.linalg.lstsq(_with_one(latents), colours).solution
        return cls(found)

    def of(self, latents: Tensor) -> Tensor:
        """[3, h, w] in 0..1 of [C, h, w] latents."""
        height, width = latents.shape[1:]
        colours = _with_one(latents.float().cpu()) @ self.weights
        return colours.T.reshape(3, height, width).clamp(0, 1)


def _with_one(latents: Tensor) -> Tensor:
    """[h * w, C + 1]."""
    flat = latents.flatten(1).T
    return torch.cat([flat, torch.ones(len(flat), 1)], dim=1)
