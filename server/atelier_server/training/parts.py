"""What a training learns, in named parts, and which of them learn when."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Parameters with a learning rate in common: the U-Net's pairs, a text encoder's, the vectors of tokens.

    `parameters` go by names that are a training's own for life: its checkpoints know them by these.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    learning_rate: float


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps `begin` to `end` (without it), in which the parts of these names learn and the others rest.

    Each phase has an optimizer and a schedule of its own, over its own steps.
    """

    name: str
    parts: tuple[str, ...]
    begin: int
    end: int
