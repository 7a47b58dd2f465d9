"""The canonical form: what an adapter is once it is inside, whatever file it came from.

The bank, the trainer, the store's files and the exporters know nothing else. Modules go by the real names of
the resident base, by component ("unet.mid_block.attentions.0....to_q", "text_encoder.encoder.layers.0...",
"text_encoder_2.text_model.encoder.layers.0..."): those are the names that `named_modules` gives.

Shapes: r rank, i features in, o features out, C channels in, n vectors of a token, d an encoder's width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LoraModule:
    """A low-rank change, W + alpha/r * B A: A [r,i] or [r,C,kh,kw], B [o,r] or [o,r,1,1].

    With `magnitude` it is DoRA (arXiv 2402.09353): V = W + alpha/r * B A becomes m * V / norm(V), with the
    norms over all inputs of an output feature for m [o], over all outputs of an input feature for [1,i].
    `bias` [o] is added to the layer's.
    """

    A: Tensor
    B: Tensor
    alpha: float
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[0]


@dataclass(frozen=True, slots=True, eq=False)
class DenseModule:
    """A full difference, W + weight and b + bias: of the layer's own shapes; also what changes a norm.

    With `magnitude` W + weight is normed as in a LoraModule.
    """

    weight: Tensor | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None


Module = LoraModule | DenseModule


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalAdapter:
    """Changes by module; learned tokens by placeholder, then by text encoder, each [n,d].

    `triggers`: words that call the subject up. `source`: what the file's header told, as text. `family`: the
    family of bases it was made for ("sd1", "sd2", "sdxl"), "" where nobody said; a label only.
    """

    modules: Mapping[str, Module]
    tokens: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    triggers: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)
    family: str = ""

    @property
    def low_rank(self) -> dict[str, LoraModule]:
        """The modules that are LoRA or DoRA."""
        return {name: module for name, module in self.modules.items() if isinstance(module, LoraModule)}

    @property
    def largest(self) -> LoraModule | None:
        """The low-rank module of the highest rank, the first by name; None without any."""
        modules = [module for _, module in sorted(self.low_rank.items())]
        return max(modules, key=lambda module: module.rank, default=None)


def blank(shapes: Mapping[str, tuple[int, ...]]) -> CanonicalAdapter:
    """An adapter of rank 1 on the U-Net's attention that changes nothing; `shapes`: of the base's weights."""
    modules = {
        name: LoraModule(torch.zeros(1, shape[1]), torch.zeros(shape[0], 1), 1.0)
        for name, shape in shapes.items()
        if name.startswith("unet.") and ".attn" in name and len(shape) == 2
    }
    return CanonicalAdapter(modules)


def tensors_of(module: Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a module that are there, by the names of their fields."""
    own = ("A", "B") if isinstance(module, LoraModule) else ("weight",)
    for name in (*own, "bias", "magnitude"):
        tensor = getattr(module, name)
        if tensor is not None:
            yield name, tensor


def finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: one of them would make the sum so."""
    # A sum is faster than asking each value; in float64 no sum of finite float32 values overflows.
    return math.isfinite(tensor.sum(dtype=torch.float64).item())
