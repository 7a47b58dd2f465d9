"""The picture that image-to-image and inpainting begin with, as the VAE sees it."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from atelier_server.core import InitImage
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.images import decode_mask, decode_picture
from atelier_server.errors import InvalidRequest, Violation

_KEPT = 16


@dataclass(frozen=True, slots=True, eq=False)
class Posterior:
    """The VAE's answer to a picture, in the U-Net's units: mean and standard deviation, each [1, C, h, w]."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw [1, C, h, w], as diffusers' pipelines take it."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


@dataclass(frozen=True, slots=True, eq=False)
class InitLatents:
    """A picture to begin with. `strength` in (0, 1] is the share of the way from noise that is walked anew.

    For inpainting, `mask` [1, 1, h, w] is 1 where the picture is painted anew and 0 where it stays, and
    `masked` is the picture with grey in place of the former.
    """

    image: Posterior
    strength: float
    mask: Tensor | None = None
    masked: Posterior | None = None


class InitImages:
    """Encodes pictures, always one at a time, and keeps the last few: a request's pictures share theirs."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._kept: OrderedDict[tuple[str, str], InitLatents] = OrderedDict()

    def latents(self, init: InitImage) -> InitLatents:
        """Raises InvalidRequest for a mask of which nothing is left at the latents' size."""
        key = (init.image_sha256, init.mask_sha256)
        if (kept := self._kept.get(key)) is None:
            kept = self._kept[key] = self._encode(init)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return InitLatents(kept.image, init.strength, kept.mask, kept.masked)

    def _encode(self, init: InitImage) -> InitLatents:
        pixels = decode_picture(init.image) * 2 - 1
        image = self._posterior(pixels)
        if not init.mask:
            return InitLatents(image, init.strength)
        mask = decode_mask(init.mask)
        latent_mask = F.interpolate(mask[None], size=image.mean.shape[2:]).to(image.mean)
        if not bool(latent_mask.any()):
            raise InvalidRequest.of(
                [
                    Violation(
                        "mask_image",
                        f"nothing of it is left at the latents' size {tuple(image.mean.shape[2:])}: "
                        "paint a larger white part",
                    )
                ]
            )
        return InitLatents(image, init.strength, latent_mask, self._posterior(pixels * (mask < 0.5)))

    def _posterior(self, pixels: Tensor) -> Posterior:
        mean, std = self._base.encode_image(pixels)
        return Posterior(mean[None], std[None])
