"""The pictures of a training, cached as the U-Net sees them.

A picture is decoded, turned upright, laid on white, scaled so that its shorter side is the resolution, and
cropped to a square; then encoded once. What is cached is the posterior of the VAE, not a sample of it: every
training step samples anew, as DreamBooth does without a cache. Random crops are drawn once, several a
picture (`CROPS`), since an uncached crop would cost an encoding a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Generator, Tensor

from atelier_server.core import Recipe, TrainingImage
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import Framing
from atelier_server.errors import InvalidRequest, Violation

CROPS = 8  # random crops a picture


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The latent posterior of one crop: mean and standard deviation, each [C,h,w], float32 on the CPU."""

    mean: Tensor
    std: Tensor
    framing: Framing


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One picture: its crops and mirror images, and its caption."""

    views: Sequence[View]
    caption: str


@dataclass(slots=True, eq=False)
class Dataset:
    """What a training looks at: pictures with captions."""

    examples: list[Example] = field(default_factory=list)

    def fill(
        self, images: Sequence[TrainingImage], recipe: Recipe, base: BaseModel, generator: Generator
    ) -> Iterator[None]:
        """Encodes all pictures, one forward of the base between two yields.

        `generator` draws the crops. Raises InvalidRequest for a picture that cannot be read.
        """
        for number, image in enumerate(images):
            views = []
            for crop in crops(_decoded(image, number), recipe, generator):
                mean, std = base.encode_image(crop.pixels)
                views.append(View(mean.float().cpu(), std.float().cpu(), crop.framing))
                yield
            self.examples.append(Example(tuple(views), image.caption or recipe.instance_prompt))

    def captions(self, recipe: Recipe) -> list[str | None]:
        """All that rows may have, each once; None is a dropped one."""
        captions = sorted({example.caption for example in self.examples})
        return [*captions, None] if recipe.caption_dropout > 0 else [*captions]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is cached, for whoever counts memory."""
        for view in (view for example in self.examples for view in example.views):
            yield from (view.mean, view.std)


def upright(image: Image.Image) -> Image.Image:
    """RGB, turned as its EXIF orientation says, transparency laid on white."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "P" or image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    elif image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to 8 bits where the high byte is meant.
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    return image.convert("RGB")


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """A square of a picture, [3, resolution, resolution] in -1..1, and where it was cut."""

    pixels: Tensor
    framing: Framing


def crops(image: Image.Image, recipe: Recipe, generator: Generator) -> list[Crop]:
    """The squares of a picture that the training sees.

    One at the centre, or CROPS random ones if `random_crop` and the picture is no square; with `random_flip`
    each is followed by its mirror image.
    """
    size = recipe.resolution
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.LANCZOS)
    slack = (width - size, height - size)
    if recipe.random_crop and any(slack):
        corners = [
            tuple(int(torch.randint(s + 1, (), generator=generator)) for s in slack) for _ in range(CROPS)
        ]
    else:
        corners = [(slack[0] // 2, slack[1] // 2)]
    squares = []
    for left, top in corners:
        pixels = _pixels(scaled.crop((left, top, left + size, top + size)))
        original, target = (image.height, image.width), (size, size)
        squares.append(Crop(pixels, Framing(original, (top, left), target)))
        if recipe.random_flip:
            # Cut from the mirrored picture.
            squares.append(Crop(pixels.flip(-1), Framing(original, (top, slack[0] - left), target)))
    return squares


@dataclass(slots=True)
class Order:
    """Shuffled epochs: every picture once in each, over the borders of batches."""

    permutation: list[int]
    cursor: int

    def take(self, count: int, size: int, generator: Generator) -> list[int]:
        """The next `count` of `size` pictures."""
        taken = []
        for _ in range(count):
            if self.cursor >= len(self.permutation):
                self.permutation = torch.randperm(size, generator=generator).tolist()
                self.cursor = 0
            taken.append(self.permutation[self.cursor])
            self.cursor += 1
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"permutation": list(self.permutation), "cursor": self.cursor}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        self.permutation, self.cursor = list(tree["permutation"]), tree["cursor"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one micro-step: latents and noise [b,C,h,w], timesteps [b] (int64), b captions (None: dropped).

    `framings` tell how the rows' pictures were cut.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Sequence[str | None]
    framings: Sequence[Framing]

    @classmethod
    def draw(
        cls,
        examples: Sequence[Example],
        *,
        caption_dropout: float,
        num_train_timesteps: int,
        generator: Generator,
    ) -> Batch:
        """One row an example. All chance comes from `generator` (CPU), in a fixed order; lies on the CPU."""
        views = [e.views[int(torch.randint(len(e.views), (), generator=generator))] for e in examples]
        mean = torch.stack([view.mean for view in views])
        std = torch.stack([view.std for view in views])
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        timesteps = torch.randint(num_train_timesteps, (len(views),), generator=generator)
        dropped = (torch.rand(len(views), generator=generator) < caption_dropout).tolist()
        captions = [None if drop else e.caption for drop, e in zip(dropped, examples, strict=True)]
        return cls(latents, noise, timesteps, captions, [view.framing for view in views])

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
        )


def _decoded(image: TrainingImage, number: int) -> Image.Image:
    try:
        with Image.open(image.path) as file:
            return upright(file)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidRequest.of([Violation(f"images[{number}]", f"cannot be decoded: {error}")]) from error


def _pixels(image: Image.Image) -> Tensor:
    values = torch.from_numpy(np.asarray(image, dtype=np.float32).copy())
    return values.permute(2, 0, 1) / 127.5 - 1.0
