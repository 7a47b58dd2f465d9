"""The slots of all layers of one shape, in two tensors: a load or a gather is a few operations for them all.

Shapes: L layers, S slots with the empty one, r the largest rank, i features in, o features out, b rows, R
packed ranks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor

from atelier_server.adapters.canonical import LoraModule
from atelier_server.adapters.layers import BankLayer, RowDelta

GroupKey = tuple[tuple[int, ...], bool, str]


def group_key(layer: BankLayer) -> GroupKey:
    """Layers that share their slots' tensors: of one shape and component, attention apart from the rest.

    An adapter usually has all of the attention or none of it; a layer that no adapter has costs memory.
    """
    return tuple(layer.weight.shape), ".attn" in layer.layer_name, component_of(layer.layer_name)


def component_of(name: str) -> str:
    """The part of the base in which a layer is: "unet", "text_encoder", ..."""
    return name.partition(".")[0]


class SlotGroup:
    """A [L, S*r, i or C,kh,kw] and Bt [L, S*r, o], zero where unused. Slot 0 is never written.

    On the layers' device and of their dtype.
    """

    def __init__(self, layers: Sequence[BankLayer], slots: int, max_rank: int) -> None:
        weight = layers[0].weight
        self._place = {layer.layer_name: place for place, layer in enumerate(layers)}
        self._max_rank = max_rank
        self._held: dict[int, frozenset[str]] = {}
        shape = (len(layers), slots * max_rank)
        like: Any = {"dtype": weight.dtype, "device": weight.device}
        self.A = torch.zeros(*shape, *weight.shape[1:], **like)
        self.Bt = torch.zeros(*shape, weight.shape[0], **like)

    def write(self, slot: int, modules: Mapping[str, LoraModule], factors: Mapping[str, float]) -> None:
        """Puts A, and B times the layer's factor, into the slot in place of what it held."""
        self.erase(slot)
        self._held[slot] = frozenset(modules)  # before a write that may fail, so that `erase` undoes it
        by_rank: defaultdict[int, list[str]] = defaultdict(list)
        for name, module in modules.items():
            by_rank[module.A.shape[0]].append(name)
        for rank, names in by_rank.items():
            a = self._stack([modules[name].A.reshape(rank, *self.A.shape[2:]) for name in names])
            b = self._stack([modules[name].B.reshape(-1, rank) for name in names]).transpose(1, 2)
            if any(factors[name] != 1.0 for name in names):
                b = (
                    b.float()
                    * torch.tensor([factors[name] for name in names], device=b.device)[:, None, None]
                )
            begin = slot * self._max_rank
            places = torch.tensor([self._place[name] for name in names], device=self.A.device)
            self.A[:, begin : begin + rank].index_copy_(0, places, a.to(self.A))
            self.Bt[:, begin : begin + rank].index_copy_(0, places, b.to(self.Bt))

    def erase(self, slot: int) -> None:
        if self._held.pop(slot, None):
            begin = slot * self._max_rank
            self.A[:, begin : begin + self._max_rank].zero_()
            self.Bt[:, begin : begin + self._max_rank].zero_()

    def gather(
        self, slots: Set[int], index: Tensor, factors: Tensor | None, rows: int
    ) -> dict[str, RowDelta]:
        """Packs ranks `index` [b*R] with `factors` [b*R,1] (float32), for the layers that `slots` change.

        None for `factors`: all of them are 1.
        """
        names = frozenset[str]().union(*(self._held.get(slot, frozenset()) for slot in slots))
        if not names:
            return {}
        a = self.A.index_select(1, index)
        bt = self.Bt.index_select(1, index)
        if factors is not None:
            bt = bt.mul_(factors) if bt.dtype == factors.dtype else (bt.float() * factors).to(bt.dtype)
        if a.dim() == 3:
            a = a.reshape(len(a), rows, -1, a.shape[2])
        deltas = [
            RowDelta(*pair)
            for pair in zip(a.unbind(0), bt.reshape(len(bt), rows, -1, bt.shape[2]).unbind(0), strict=True)
        ]
        return {name: deltas[place] for name, place in self._place.items() if name in names}

    def _stack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Where they are; on the layers' device if some are there already: DoRA is worked out on it."""
        if len({tensor.device for tensor in tensors}) > 1:
            tensors = [tensor.to(self.A.device) for tensor in tensors]
        return torch.stack(list(tensors))

    @property
    def size_bytes(self) -> int:
        return self.A.nbytes + self.Bt.nbytes
