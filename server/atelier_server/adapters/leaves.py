"""What trainings learn in the layers of a base: LoRA and DoRA with gradients, of one training or several.

Shapes: b rows, r rank, i features in, o features out, C channels, k the kernel (nothing for a linear layer).
Leaves are float32 whatever the base is: inputs are cast to it, changes to the base's own dtype.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_server.adapters.changes import full
from atelier_server.adapters.layers import Delta, checked_rows

Pair = tuple[Tensor, Tensor]
"""A [r,i] or [r,C,kh,kw] and B [o,r] or [o,r,1,1]."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """The trainable pair of one layer: y + scale * B A x, A and B of the shapes of a `Pair`.

    `initial` is a pair that is taken away from it, without gradients: for initial weights that are taken out
    of the base's (PiSSA, OLoRA), which itself is never written.
    """

    A: nn.Parameter
    B: nn.Parameter
    scale: float
    initial: Pair | None = None

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        if self.initial is not None or not x.dtype == y.dtype == self.A.dtype:
            return y + self.linear_change(x).to(y.dtype)
        # The same in two products, with the sum and the scale in the second.
        hidden = F.linear(x, self.A).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), hidden, self.B.t(), alpha=self.scale).view_as(y)

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        return y + self.conv_change(x, layer).to(y.dtype)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {"A": self.A, "B": self.B}

    def linear_change(self, x: Tensor) -> Tensor:
        """x [b,...,i] -> [b,...,o], float32."""
        x = x.to(self.A.dtype)
        change = F.linear(F.linear(x, self.A), self.B)
        if self.initial is not None:
            change = change - F.linear(F.linear(x, self.initial[0]), self.initial[1])
        return change * self.scale

    def conv_change(self, x: Tensor, layer: nn.Conv2d) -> Tensor:
        """x [b,C,H,W] -> [b,o,H',W'], float32."""
        hidden = F.conv2d(x.to(self.A.dtype), self.A, None, layer.stride, layer.padding, layer.dilation)
        return F.conv2d(hidden, self.B) * self.scale

    @torch.no_grad()
    def weight_change(self) -> Tensor:
        """scale * B A, [o,i*k]."""
        change = self.B.flatten(1) @ self.A.flatten(1)
        if self.initial is not None:
            change = change - self.initial[1].flatten(1) @ self.initial[0].flatten(1)
        return change * self.scale


@dataclass(frozen=True, slots=True, eq=False)
class DoraLeaf:
    """A leaf with a trainable `magnitude` [o] of the weights of `layer` (arXiv 2402.09353).

    W' = m * V / norm(V) with V = W + scale * B A; the norms get no gradient (section 4.3 of the paper).
    """

    low_rank: Leaf
    magnitude: nn.Parameter
    layer: nn.Linear | nn.Conv2d

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        return self._scaled(y, self.low_rank.linear_change(x), -1)

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        return self._scaled(y, self.low_rank.conv_change(x, layer), 1)

    def parameters(self) -> dict[str, nn.Parameter]:
        return {**self.low_rank.parameters(), "magnitude": self.magnitude}

    def _scaled(self, y: Tensor, change: Tensor, axis: int) -> Tensor:
        shape = [-1 if dim == axis % y.dim() else 1 for dim in range(y.dim())]
        gain = (self.magnitude / self._norms()).reshape(shape)
        bare = y if self.layer.bias is None else y - self.layer.bias.reshape(shape)
        return y + ((gain - 1) * bare + gain * change).to(y.dtype)

    @torch.no_grad()
    def _norms(self) -> Tensor:
        """[o]"""
        weight = full(self.layer.weight).flatten(1).to(self.magnitude.dtype)
        norms: Tensor = torch.linalg.vector_norm(weight + self.low_rank.weight_change(), dim=1)
        return norms


AnyLeaf = Leaf | DoraLeaf


@dataclass(frozen=True, slots=True, eq=False)
class SharedLeaves:
    """The leaves of several trainings, each for as many rows of the batch as it says; None is the base alone.

    Each training's rows go through its leaf by themselves, in products of shapes that are its own: neither
    the ranks of its neighbours nor their kinds can change a bit of it. Pairs of one shape and number of rows
    are the entries of one batched product, which has as many as the batch could hold, whoever is there.
    """

    parts: Sequence[tuple[int, Delta | None]]

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        alike = self._alike()
        learning = [place for place, (_, leaf) in enumerate(self.parts) if leaf is not None]
        if len(alike) == 1:
            [(rows, places)] = alike
            # Nobody else learns, and they fill the batch from its front: it is as it has to be.
            if places == learning == list(range(len(places))) and len(x) % rows == 0:
                return y + self._product(x, rows, places).reshape(y.shape).to(y.dtype)
        xs, changed = self._split(x), list(self._split(y))
        for rows, places in alike:
            entries = [xs[place] for place in places]
            missing = len(x) // rows - len(places)
            padded = torch.cat([*entries, x.new_zeros(missing * rows, *x.shape[1:])])
            changes = self._product(padded, rows, places).to(y.dtype)
            for place, change in zip(places, changes, strict=False):
                changed[place] = changed[place] + change.reshape(changed[place].shape)
        paired = {place for _, places in alike for place in places}
        for place, (_, leaf) in enumerate(self.parts):
            if leaf is not None and place not in paired:
                changed[place] = leaf.linear(xs[place], changed[place])
        return torch.cat(changed)

    def _alike(self) -> list[tuple[int, list[int]]]:
        """Rows and places of the parts that share a product, by what they have in common."""
        found: dict[tuple[int, int], list[int]] = {}
        for place, (rows, leaf) in enumerate(self.parts):
            if isinstance(leaf, Leaf) and leaf.initial is None:
                found.setdefault((rows, len(leaf.A)), []).append(place)
        return [(rows, places) for (rows, _), places in found.items()]

    def _product(self, x: Tensor, rows: int, places: Sequence[int]) -> Tensor:
        """scale * B A x, [entries, rows * n, o], of x [entries * rows, ..., i]; 0 where there is no leaf."""
        leaves = [leaf for place in places if isinstance(leaf := self.parts[place][1], Leaf)]
        entries = len(x) // rows
        a, b = leaves[0].A, leaves[0].B
        missing = entries - len(leaves)
        A = torch.stack([*(leaf.A for leaf in leaves), *[a.new_zeros(a.shape)] * missing])
        B = torch.stack([*(leaf.B for leaf in leaves), *[b.new_zeros(b.shape)] * missing])
        scales = a.new_tensor([*(leaf.scale for leaf in leaves), *[0.0] * missing])[:, None, None]
        hidden = torch.bmm(x.to(a.dtype).reshape(entries, -1, x.shape[-1]), A.transpose(1, 2))
        return torch.bmm(hidden, B.transpose(1, 2)) * scales

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        pieces = [
            y if leaf is None else leaf.conv(x, y, layer)
            for x, y, (_, leaf) in zip(self._split(x), self._split(y), self.parts, strict=True)
        ]
        return torch.cat(pieces)

    def _split(self, x: Tensor) -> Sequence[Tensor]:
        """One node of the graph for all parts: slices would each have a gradient of the whole batch."""
        sizes = [rows for rows, _ in self.parts]
        checked_rows(x, sum(sizes))
        return torch.split(x, sizes)


@dataclass(frozen=True, slots=True, eq=False)
class LeafSet:
    """What one training learns in the layers of the base, by layer name."""

    leaves: Mapping[str, AnyLeaf]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """By LAYER.PART, in the order of the layers: A, B, and the magnitude where there is one."""
        return {
            f"{name}.{part}": parameter
            for name, leaf in self.leaves.items()
            for part, parameter in leaf.parameters().items()
        }

    def parameters(self) -> list[nn.Parameter]:
        return list(self.named_parameters().values())


def shared(rows: Sequence[LeafSet | None]) -> dict[str, SharedLeaves]:
    """The deltas of a forward whose rows each have leaves of their own, or none."""
    parts: list[tuple[int, LeafSet | None]] = []
    for leaves in rows:
        if parts and parts[-1][1] is leaves:
            parts[-1] = (parts[-1][0] + 1, leaves)
        else:
            parts.append((1, leaves))
    names = sorted({name for _, leaves in parts if leaves is not None for name in leaves.leaves})
    return {
        name: SharedLeaves(
            [(count, None if leaves is None else leaves.leaves.get(name)) for count, leaves in parts]
        )
        for name in names
    }
