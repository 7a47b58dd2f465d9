"""What a tuned module of the base changes, as an adapter: weights in memory, layer by layer.

Linear and convolution layers become pairs of a given rank, with the differences of their biases beside them;
norms are kept whole. Tables of embeddings have no place in an adapter: what they learned is lost, and counts
so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from atelier_server.adapters.algebra import module_of, nearest
from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, Module


@dataclass(eq=False)
class Tuning:
    """The extraction of `tuned` less `base`, both by the names of parameters ("unet.conv_in.weight").

    `shapes`: of the weights of layers and norms that an adapter can change. Small pieces: see `steps`.
    """

    tuned: Mapping[str, Tensor]
    base: Mapping[str, Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    rank: int
    modules: dict[str, Module] = field(default_factory=dict)
    _kept: float = 0.0
    _square: float = 0.0

    def steps(self) -> Iterator[None]:
        """One layer between two yields."""
        layers = dict.fromkeys(name.rpartition(".")[0] for name in self.tuned)
        for layer in layers:
            self._layer(layer)
            yield

    @property
    def kept_share(self) -> float:
        """Of the change's squared norm, over everything that was tuned; 1 where nothing changed."""
        return min(self._kept / self._square, 1.0) if self._square else 1.0

    def adapter(self, family: str) -> CanonicalAdapter:
        return CanonicalAdapter(self.modules, family=family)

    @torch.no_grad()
    def _layer(self, name: str) -> None:
        weight, bias = self._difference(f"{name}.weight"), self._difference(f"{name}.bias")
        squares = [0.0 if d is None else d.double().square().sum().item() for d in (weight, bias)]
        self._square += sum(squares)
        shape = self.shapes.get(name)
        if shape is None or not sum(squares):
            return
        own_bias = bias.cpu() if bias is not None and squares[1] else None
        self._kept += squares[1]
        if weight is None or not squares[0]:
            self.modules[name] = DenseModule(None, own_bias)
        elif len(shape) == 1:
            self._kept += squares[0]
            self.modules[name] = DenseModule(weight.cpu(), own_bias)
        else:
            pair, held = nearest(weight.flatten(1), self.rank)
            self._kept += held
            self.modules[name] = module_of(pair, shape, own_bias)

    def _difference(self, name: str) -> Tensor | None:
        """float32, where the tuned weight is."""
        if (tuned := self.tuned.get(name)) is None:
            return None
        return tuned.detach().float() - self.base[name].detach().to(tuned.device, torch.float32)
