"""Pictures as a training sees them: upright, on white, cut to a size, and how much each pixel of them counts.

Sizes are (width, height) in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor

from atelier_server.core import Recipe
from atelier_server.diffusion.conditioning import Framing
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.raster import Raster

Size = tuple[int, int]

CROPS = 8  # random crops a picture that are encoded ahead
_WIDEST = 4.0  # aspect ratio of the widest bucket, width to height


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """A piece of a picture, [3, H, W] in -1..1, and where it was cut.

    `mask` [H, W] in 0..1 tells how much each pixel counts; None: all of them count.
    """

    pixels: Tensor
    framing: Framing
    mask: Tensor | None = None

    def mirrored(self, left: int) -> Crop:
        """Its mirror image, whose left edge is `left` of the mirrored picture."""
        top, _ = self.framing.corner
        mask = None if self.mask is None else self.mask.flip(-1)
        return Crop(self.pixels.flip(-1), replace(self.framing, corner=(top, left)), mask)

    def latent_mask(self, scale: int) -> Tensor | None:
        """How much each latent pixel counts, [1, h, w]: the mean over its square of `scale` pixels."""
        return None if self.mask is None else F.avg_pool2d(self.mask[None], scale)


def opened(path: str, field: str) -> Raster:
    """A picture's file, on white. Raises InvalidRequest, which names `field`, for one that cannot be read."""
    try:
        with Image.open(path) as file:
            return Raster.of(file)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest.of([Violation(field, f"cannot be decoded: {error}")]) from error


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """The square, and the other sizes of at most its area whose sides are multiples of `step`.

    For each side there is the longest other one, up to an aspect ratio of 1 to 4 (kohya's buckets).
    """
    longest = int(resolution * math.sqrt(_WIDEST))
    sizes = {(resolution, resolution)}
    for width in range(step, longest + 1, step):
        height = min(longest, resolution**2 // width) // step * step
        if height and max(width / height, height / width) <= _WIDEST:
            sizes |= {(width, height), (height, width)}
    return sorted(sizes)


def nearest_size(size: Size, sizes: Sequence[Size]) -> Size:
    """Of the aspect ratio that is nearest to the picture's, the largest."""
    ratio = math.log(size[0] / size[1])
    return min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - ratio), -s[0] * s[1], s))


def crops(picture: Raster, size: Size, recipe: Recipe, generator: Generator) -> list[Crop]:
    """The pieces of a picture that are encoded ahead.

    One at the centre, or CROPS random ones if `random_crop` and the picture has another shape; with
    `random_flip` each is followed by its mirror image.
    """
    cutter = _Cutter.of(picture, size, masked=recipe.masked_loss)
    random = recipe.random_crop and any(cutter.slack)
    corners = [cutter.random(generator) for _ in range(CROPS)] if random else [cutter.centre]
    pieces = []
    for corner in corners:
        crop = cutter.cut(corner)
        pieces.append(crop)
        if recipe.random_flip:
            pieces.append(crop.mirrored(cutter.slack[0] - corner[0]))
    return pieces


def fresh_crop(picture: Raster, size: Size, recipe: Recipe, generator: Generator) -> Crop:
    """One piece, drawn anew: any corner, if `random_crop`, and either of the two sides, if `random_flip`."""
    cutter = _Cutter.of(picture, size, masked=recipe.masked_loss)
    corner = cutter.random(generator) if recipe.random_crop and any(cutter.slack) else cutter.centre
    crop = cutter.cut(corner)
    if recipe.random_flip and int(torch.randint(2, (), generator=generator)):
        return crop.mirrored(cutter.slack[0] - corner[0])
    return crop


@dataclass(frozen=True, slots=True, eq=False)
class _Cutter:
    """A picture scaled so that it just covers `size`; `slack` is what it has more, (right, down)."""

    scaled: Image.Image
    opacity: Image.Image | None
    original: Size
    size: Size
    masked: bool

    @classmethod
    def of(cls, picture: Raster, size: Size, *, masked: bool) -> _Cutter:
        original = picture.image.size
        scale = max(target / side for target, side in zip(size, original, strict=True))
        width, height = (
            max(target, round(side * scale)) for target, side in zip(size, original, strict=True)
        )

        def resized(image: Image.Image) -> Image.Image:
            return image.resize((width, height), Image.Resampling.LANCZOS)

        opacity = resized(picture.opacity) if masked and picture.opacity else None
        return cls(resized(picture.image), opacity, original, size, masked)

    @property
    def slack(self) -> Size:
        return self.scaled.width - self.size[0], self.scaled.height - self.size[1]

    @property
    def centre(self) -> Size:
        return self.slack[0] // 2, self.slack[1] // 2

    def random(self, generator: Generator) -> Size:
        left, top = (int(torch.randint(slack + 1, (), generator=generator)) for slack in self.slack)
        return left, top

    def cut(self, corner: Size) -> Crop:
        (left, top), (width, height) = corner, self.size
        box = (left, top, left + width, top + height)
        framing = Framing((self.original[1], self.original[0]), (top, left), (height, width))
        mask = None
        if self.masked:
            mask = _values(self.opacity.crop(box)) / 255 if self.opacity else torch.ones(height, width)
        return Crop(_values(self.scaled.crop(box)).permute(2, 0, 1) / 127.5 - 1.0, framing, mask)


def _values(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
