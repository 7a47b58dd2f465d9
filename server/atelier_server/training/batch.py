"""Which pictures make the rows of a micro-step, and what is drawn for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from atelier_server.core import Recipe
from atelier_server.diffusion.conditioning import Framing
from atelier_server.training.dataset import Dataset, Example


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


class Orders:
    """The pictures of the next micro-step, all of one size, and as many of the class where there are any.

    Where there are several sizes, a shuffled epoch over all pictures decides the next one's, so that each
    picture is seen as often as any other; the pictures come out of the epochs of their size.
    """

    def __init__(self, dataset: Dataset, recipe: Recipe) -> None:
        self._dataset = dataset
        self._recipe = recipe
        self._orders: dict[str, Order] = {}

    def take(self, generator: Generator) -> tuple[list[Example], int]:
        """The rows' pictures, and how many of them (the first) teach; the others are of the class."""
        examples, count = self._dataset.examples, self._recipe.train_batch_size
        size, name = examples[0].size, ""
        if len({example.size for example in examples}) > 1:
            (index,) = self._order("sizes").take(1, len(examples), generator)
            size = examples[index].size
            name = f"{size[0]}x{size[1]}"
        alike = self._dataset.of_size(size)
        taken = self._order(name).take(count, len(alike) * self._recipe.repeats, generator)
        rows = [alike[index % len(alike)] for index in taken]
        if of_class := self._dataset.class_examples.get(size):
            taken = self._order("class").take(count, len(of_class), generator)
            rows += [of_class[index] for index in taken]
        return rows, count

    def _order(self, name: str) -> Order:
        return self._orders.setdefault(name, Order([], 0))

    def state_dict(self) -> dict[str, Any]:
        return {name: order.state_dict() for name, order in self._orders.items()}

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        for name, state in tree.items():
            self._order(name).load_state_dict(state)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Rows of one micro-step: latents and noise [b,C,h,w], timesteps [b] (int64), b captions (None: dropped).

    `framings` tell how the rows' pictures were cut; `masks` [b,1,h,w] how much each latent pixel counts. The
    first `instances` rows teach; after them come those of the class, and whatever the objective adds.
    """

    latents: Tensor
    noise: Tensor
    timesteps: Tensor
    captions: Sequence[str | None]
    framings: Sequence[Framing]
    instances: int
    masks: Tensor | None = None

    @classmethod
    def draw(
        cls,
        examples: Sequence[Example],
        instances: int,
        recipe: Recipe,
        *,
        num_train_timesteps: int,
        generator: Generator,
    ) -> Batch:
        """One row an example. All chance comes from `generator` (CPU), in a fixed order; lies on the CPU."""
        views = [example.view(generator) for example in examples]
        mean = torch.stack([view.mean for view in views])
        std = torch.stack([view.std for view in views])
        latents = mean + std * torch.randn(mean.shape, generator=generator)
        noise = torch.randn(mean.shape, generator=generator)
        if recipe.noise_offset > 0:
            # One number a row and channel: how bright a picture is gets noise too, and so can be learned.
            noise += recipe.noise_offset * torch.randn(*mean.shape[:2], 1, 1, generator=generator)
        timesteps = torch.randint(num_train_timesteps, (len(views),), generator=generator)
        dropped = (torch.rand(instances, generator=generator) < recipe.caption_dropout).tolist()
        dropped += [False] * (len(views) - instances)
        captions = [None if drop else e.caption for drop, e in zip(dropped, examples, strict=True)]
        masks = [view.mask for view in views if view.mask is not None]
        return cls(
            latents,
            noise,
            timesteps,
            captions,
            [view.framing for view in views],
            instances,
            torch.stack(masks) if masks else None,
        )

    def to(self, device: torch.device) -> Batch:
        return replace(
            self,
            latents=self.latents.to(device),
            noise=self.noise.to(device),
            timesteps=self.timesteps.to(device),
            masks=None if self.masks is None else self.masks.to(device),
        )

    def at(self, timesteps: Tensor) -> Batch:
        """The same rows at other timesteps [b]."""
        return replace(self, timesteps=timesteps)

    def with_rows(self, again: int, captions: Sequence[str | None]) -> Batch:
        """With the first `again` rows once more after the others, under these captions."""

        def longer(rows: Tensor) -> Tensor:
            return torch.cat([rows, rows[:again]])

        return replace(
            self,
            latents=longer(self.latents),
            noise=longer(self.noise),
            timesteps=longer(self.timesteps),
            captions=[*self.captions, *captions],
            framings=[*self.framings, *self.framings[:again]],
            masks=None if self.masks is None else longer(self.masks),
        )
