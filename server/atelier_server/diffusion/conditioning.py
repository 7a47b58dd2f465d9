"""What the U-Net is conditioned on beside latents and timesteps, and how rows of it become a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class TextEmbeds:
    """A text as the encoders see it: hidden states [tokens, dim], and [dim] of the whole (None: not used)."""

    states: Tensor
    pooled: Tensor | None = None

    def tensors(self) -> tuple[Tensor, ...]:
        return (self.states,) if self.pooled is None else (self.states, self.pooled)

    def detach(self) -> TextEmbeds:
        """Out of the graph."""
        return TextEmbeds(self.states.detach(), None if self.pooled is None else self.pooled.detach())

    def zeros(self) -> TextEmbeds:
        """The same shapes, all zero: no text at all."""
        pooled = None if self.pooled is None else torch.zeros_like(self.pooled)
        return TextEmbeds(torch.zeros_like(self.states), pooled)

    def lengthened(self, tokens: int, empty: TextEmbeds) -> TextEmbeds:
        """With as many `empty` texts after it as make up `tokens`."""
        missing = (tokens - len(self.states)) // len(empty.states)
        return (
            TextEmbeds(torch.cat([self.states, *[empty.states] * missing]), self.pooled) if missing else self
        )


@dataclass(frozen=True, slots=True)
class Framing:
    """A picture's size, and how it was cut from a larger one: SDXL's micro-conditioning (arXiv 2307.01952).

    All in pixels, the vertical first: the size before scaling, the corner of the crop, the size of the crop.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]

    @classmethod
    def whole(cls, width: int, height: int) -> Framing:
        """A picture that was not cut."""
        return cls((height, width), (0, 0), (height, width))


@dataclass(frozen=True, slots=True, eq=False)
class Conditioning:
    """One row: prompt_embeds [tokens, dim], and what goes into diffusers' `added_cond_kwargs`, without b.

    Stacked, everything has b rows in front.
    """

    prompt_embeds: Tensor
    added: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def stack(cls, rows: Sequence[Conditioning], bucket: int | None = None) -> Conditioning:
        """[b, ...] of the rows, with rows of zeros after them up to `bucket`."""
        padding = (bucket or len(rows)) - len(rows)

        def stacked(tensors: Sequence[Tensor]) -> Tensor:
            return torch.stack([*tensors, *[torch.zeros_like(tensors[0])] * padding])

        return cls(
            stacked([row.prompt_embeds for row in rows]),
            {key: stacked([row.added[key] for row in rows]) for key in rows[0].added},
        )

    def to(self, dtype: torch.dtype) -> Conditioning:
        """Of that dtype; itself if it is."""
        if self.prompt_embeds.dtype == dtype:
            return self
        return Conditioning(
            self.prompt_embeds.to(dtype), {key: tensor.to(dtype) for key, tensor in self.added.items()}
        )

    @classmethod
    def concatenated(cls, batches: Sequence[Conditioning], bucket: int) -> Conditioning:
        """The rows of stacked ones after each other, with rows of zeros after them up to `bucket`."""

        def joined(tensors: Sequence[Tensor]) -> Tensor:
            padding = bucket - sum(len(tensor) for tensor in tensors)
            if not padding and len(tensors) == 1:
                return tensors[0]
            return torch.cat([*tensors, tensors[0].new_zeros(padding, *tensors[0].shape[1:])])

        return cls(
            joined([batch.prompt_embeds for batch in batches]),
            {key: joined([batch.added[key] for batch in batches]) for key in batches[0].added},
        )
