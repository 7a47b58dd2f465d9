"""The pictures of a training as the U-Net sees them.

What is cached of a picture is the posterior of the VAE, not a sample of it: every training step samples anew,
as DreamBooth does without a cache. Random crops are drawn ahead then, several a picture (`CROPS`), since each
costs an encoding. Without a cache a picture is read, cut and encoded in every step: any crop, and no memory.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Generator, Tensor

from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import Framing
from atelier_server.errors import InvalidRequest, Violation
from atelier_server.training.pictures import (
    Crop,
    Size,
    bucket_sizes,
    crops,
    fresh_crop,
    nearest_size,
    opened,
)


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The latent posterior of one crop: mean and standard deviation, each [C,h,w], float32 on the CPU.

    `mask` [1,h,w] weighs the loss of each latent pixel; None: all count the same.
    """

    mean: Tensor
    std: Tensor
    framing: Framing
    mask: Tensor | None = None


class Example(Protocol):
    """One picture of a training with its caption. `size` is that of all its crops, in pixels."""

    @property
    def caption(self) -> str: ...

    @property
    def size(self) -> Size: ...

    def view(self, generator: Generator) -> View:
        """A crop of it; all chance comes from `generator`."""


@dataclass(frozen=True, slots=True, eq=False)
class CachedExample:
    """Its crops and mirror images were encoded ahead."""

    views: Sequence[View]
    caption: str

    @property
    def size(self) -> Size:
        height, width = self.views[0].framing.target
        return width, height

    def view(self, generator: Generator) -> View:
        return self.views[int(torch.randint(len(self.views), (), generator=generator))]


@dataclass(frozen=True, slots=True, eq=False)
class FreshExample:
    """Read from its file, cut and encoded each time. `name` is what an error calls it."""

    path: str
    name: str
    caption: str
    size: Size
    recipe: Recipe
    base: BaseModel

    def view(self, generator: Generator) -> View:
        crop = fresh_crop(opened(self.path, self.name), self.size, self.recipe, generator)
        return encoded(crop, self.base)


@dataclass(slots=True, eq=False)
class Dataset:
    """`examples` teach, `class_examples` (by size) keep the class, `held_out` are for the validation loss."""

    examples: list[Example] = field(default_factory=list)
    class_examples: dict[Size, list[Example]] = field(default_factory=dict)
    held_out: list[Example] = field(default_factory=list)

    def fill(self, job: TrainingJob, base: BaseModel, generator: Generator) -> Iterator[None]:
        """Reads all pictures, one forward of the base between two yields.

        `generator` draws the crops. Raises InvalidRequest for a picture that cannot be read.
        """
        recipe = job.recipe
        sizes = [(recipe.resolution, recipe.resolution)]
        if recipe.aspect_ratio_buckets:
            sizes = bucket_sizes(recipe.resolution, base.size_step)
        reader = _Reader(recipe, base, generator)
        still = replace(recipe, random_crop=False, random_flip=False, cache_latents=True)
        held = held_out(len(job.images), recipe)
        for number, image in enumerate(job.images):
            captioned = replace(image, caption=image.caption or recipe.instance_prompt)
            now, examples = (
                (_Reader(still, base, generator), self.held_out)
                if number in held
                else (reader, self.examples)
            )
            examples.append((yield from now.read(captioned, f"images[{number}]", sizes)))
        if recipe.with_prior_preservation:
            # Cut to every size that a batch may have.
            for size in sorted({example.size for example in self.examples}):
                examples = self.class_examples[size] = []
                for number, path in sorted(job.class_images):
                    image = TrainingImage(path, recipe.class_prompt)
                    examples.append((yield from reader.read(image, f"class_images[{number}]", [size])))

    def of_size(self, size: Size) -> list[Example]:
        return [example for example in self.examples if example.size == size]

    def captions(self, recipe: Recipe) -> list[str | None]:
        """All that rows may have, each once; None is a dropped one."""
        captions = {example.caption for example in self._every()}
        return [*sorted(captions), *([None] if recipe.caption_dropout > 0 else [])]

    def tensors(self) -> Iterator[Tensor]:
        """Everything that is cached, for whoever counts memory."""
        for example in self._every():
            for view in example.views if isinstance(example, CachedExample) else ():
                yield from (t for t in (view.mean, view.std, view.mask) if t is not None)

    def _every(self) -> list[Example]:
        return [*self.examples, *self.held_out, *(e for some in self.class_examples.values() for e in some)]


def held_out(count: int, recipe: Recipe) -> frozenset[int]:
    """Which of so many pictures no step sees: a share drawn from the seed, at least one, never all."""
    if recipe.validation_split <= 0:
        return frozenset()
    if count < 2:
        told = f"{recipe.validation_split:g} of a single picture: there is none to hold out and one to learn"
        raise InvalidRequest.of([Violation("recipe.validation_split", told)])
    share = min(count - 1, max(1, round(recipe.validation_split * count)))
    chance = torch.Generator().manual_seed(recipe.seed)
    return frozenset(torch.randperm(count, generator=chance)[:share].tolist())


def encoded(crop: Crop, base: BaseModel) -> View:
    """As the U-Net sees it: a forward of the VAE."""
    mean, std = base.encode_image(crop.pixels)
    return View(mean.float().cpu(), std.float().cpu(), crop.framing, crop.latent_mask(base.latent_scale))


@dataclass(frozen=True, slots=True, eq=False)
class _Reader:
    """Makes examples of files."""

    recipe: Recipe
    base: BaseModel
    generator: Generator

    def read(
        self, image: TrainingImage, name: str, sizes: Sequence[Size]
    ) -> collections.abc.Generator[None, None, Example]:
        """A picture, cut to the nearest of the sizes; yields after each forward. An error calls it `name`."""
        picture = opened(image.path, name)
        size = nearest_size(picture.image.size, sizes)
        if not self.recipe.cache_latents:
            return FreshExample(image.path, name, image.caption, size, self.recipe, self.base)
        views = []
        for crop in crops(picture, size, self.recipe, self.generator):
            views.append(encoded(crop, self.base))
            yield
        return CachedExample(tuple(views), image.caption)
