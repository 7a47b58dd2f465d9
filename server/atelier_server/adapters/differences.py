"""Gains, shifts and whole differences of slots: what rows add to a layer beside their pairs A and B.

A gain or a shift is a number an output feature, and one operation for all rows. A difference takes the memory
of the layer in each slot, and each row that uses it a product as dear as the layer's own: rows are taken one
by one, so that their bits do not depend on their neighbours, and those without are not touched.

Shapes: b rows, n tokens, i features in, o features out, T outputs of all layers together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_server.adapters.changes import Difference, LayerChange, full
from atelier_server.adapters.layers import BankGroupNorm, BankNorm, RowDelta

WeightedRow = Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True, eq=False)
class RowDifference:
    """`difference`, times `factor`, for one row of the batch."""

    row: int
    factor: float
    difference: Difference


@dataclass(frozen=True, slots=True, eq=False)
class MixedDelta:
    """All that a layer's rows add, in a fixed order: y + gain y + shift, differences row by row, then B A x.

    gain and shift [b,o], zero in rows that have none: such a row's bits stay as they are.
    """

    rows: int
    gain: Tensor | None
    shift: Tensor | None
    differences: Sequence[RowDifference]
    low_rank: RowDelta | None

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        self._check(x)
        flat = y.reshape(self.rows, -1, y.shape[-1])
        self._scale(flat, 1)
        for term in self.differences:
            weight, inputs = term.difference.weight, x[term.row].reshape(-1, x.shape[-1])
            assert weight is not None
            if term.difference.inputs is not None:
                inputs = inputs * term.difference.inputs
            flat[term.row].addmm_(inputs, full(weight).t(), alpha=term.factor)
        y = flat.reshape(y.shape)
        return y if self.low_rank is None else self.low_rank.linear(x, y)

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        self._check(x)
        flat = y.reshape(self.rows, y.shape[1], -1)
        self._scale(flat, 2)
        for term in self.differences:
            weight, inputs = term.difference.weight, x[term.row : term.row + 1]
            assert weight is not None
            if term.difference.inputs is not None:
                inputs = inputs * term.difference.inputs
            added = F.conv2d(inputs, weight, None, layer.stride, layer.padding, layer.dilation)
            flat[term.row].add_(added.flatten(2)[0], alpha=term.factor)
        y = flat.reshape(y.shape)
        return y if self.low_rank is None else self.low_rank.conv(x, y, layer)

    def _scale(self, flat: Tensor, axis: int) -> None:
        """In place: the base layer's output is fresh."""
        if self.gain is not None:
            flat.addcmul_(flat, self.gain.unsqueeze(axis))
        if self.shift is not None:
            flat.add_(self.shift.unsqueeze(axis))

    def _check(self, x: Tensor) -> None:
        if x.shape[0] != self.rows:
            raise RuntimeError(f"a forward of {x.shape[0]} rows, but the bank was set for {self.rows}")


@dataclass(frozen=True, slots=True, eq=False)
class RowNorms:
    """Weights and biases that rows add to a norm's."""

    differences: Sequence[RowDifference]

    def norm(self, x: Tensor, y: Tensor, layer: BankNorm) -> Tensor:
        for term in self.differences:
            weight, bias = term.difference.weight, term.difference.bias
            if weight is None:  # else torch takes it for ones
                weight = torch.zeros_like(layer.weight)
            row = x[term.row : term.row + 1]
            added = (
                F.group_norm(row, layer.num_groups, weight, bias, layer.eps)
                if isinstance(layer, BankGroupNorm)
                else F.layer_norm(row, layer.normalized_shape, weight, bias, layer.eps)
            )
            y[term.row].add_(added[0], alpha=term.factor)
        return y


# -------------------------------------------------------------------------------------------- the slots'
@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """One slot's. gains and shifts [T], float32, None where no layer has one."""

    gains: Tensor | None
    shifts: Tensor | None
    scaled: frozenset[str]
    differences: Mapping[str, Difference]

    def __str__(self) -> str:
        return (
            f"gains or shifts of {len(self.scaled)} layers and differences of {len(self.differences)} "
            f"take {self.size_bytes} bytes beside the slots"
        )

    @property
    def size_bytes(self) -> int:
        vectors = sum(tensor.nbytes for tensor in (self.gains, self.shifts) if tensor is not None)
        return vectors + sum(difference.size_bytes for difference in self.differences.values())


class Differences:
    """Gains, shifts and differences of all slots. Tensors are never written again: rows hold on to them."""

    def __init__(self) -> None:
        self._places: dict[str, slice] = {}
        self._outputs = 0
        self._dtype = torch.float32
        self._held: dict[int, _Held] = {}

    def add_layer(self, name: str, weight: Tensor) -> None:
        """`weight` [o,...]; its dtype is that of all layers."""
        self._places[name] = slice(self._outputs, self._outputs + len(weight))
        self._outputs += len(weight)
        self._dtype = weight.dtype

    def packed(self, changes: Mapping[str, LayerChange]) -> _Held | None:
        """What `put` takes: all memory is taken here. None if there is nothing beside pairs."""
        gains = {name: change.gain for name, change in changes.items() if change.gain is not None}
        shifts = {name: change.shift for name, change in changes.items() if change.shift is not None}
        differences = {name: c.difference for name, c in changes.items() if c.difference is not None}
        if not (gains or shifts or differences):
            return None
        scaled = frozenset(gains) | frozenset(shifts)
        return _Held(self._vector(gains), self._vector(shifts), scaled, differences)

    def put(self, slot: int, held: _Held | None) -> None:
        self._held.pop(slot, None)
        if held is not None:
            self._held[slot] = held

    def gather(
        self, rows: Sequence[WeightedRow], low_rank: Mapping[str, RowDelta]
    ) -> tuple[dict[str, MixedDelta], dict[str, RowNorms]]:
        """Deltas of the layers that some row changes by more than a pair, with the pairs; deltas of norms."""
        used = [
            (n, self._held[slot], w) for n, row in enumerate(rows) for slot, w in row if slot in self._held
        ]
        return self._deltas(used, len(rows), low_rank)

    def alone(
        self, changes: Mapping[str, LayerChange], low_rank: Mapping[str, RowDelta]
    ) -> tuple[dict[str, MixedDelta], dict[str, RowNorms]]:
        """The deltas of a single row that has these changes, which lie in no slot."""
        held = self.packed(changes)
        return self._deltas([] if held is None else [(0, held, 1.0)], 1, low_rank)

    def _deltas(
        self, used: Sequence[tuple[int, _Held, float]], rows: int, low_rank: Mapping[str, RowDelta]
    ) -> tuple[dict[str, MixedDelta], dict[str, RowNorms]]:
        """`used`: what row has whose changes at what weight."""
        if not used:
            return {}, {}
        gains = self._rows([(n, held.gains, w) for n, held, w in used], rows)
        shifts = self._rows([(n, held.shifts, w) for n, held, w in used], rows)
        terms: dict[str, list[RowDifference]] = {}
        for n, held, weight in used:
            for name, difference in held.differences.items():
                terms.setdefault(name, []).append(RowDifference(n, weight, difference))
        scaled = frozenset[str]().union(*(held.scaled for _, held, _ in used))
        mixed: dict[str, MixedDelta] = {}
        for name, place in self._places.items():
            if name in scaled or name in terms:
                gain = gains[:, place] if gains is not None and name in scaled else None
                shift = shifts[:, place] if shifts is not None and name in scaled else None
                pair = low_rank.get(name)
                mixed[name] = MixedDelta(rows, gain, shift, tuple(terms.pop(name, ())), pair)
        return mixed, {name: RowNorms(tuple(rest)) for name, rest in terms.items()}

    @property
    def size_bytes(self) -> int:
        return sum(held.size_bytes for held in self._held.values())

    def _vector(self, parts: Mapping[str, Tensor]) -> Tensor | None:
        """[T]"""
        if not parts:
            return None
        vector = next(iter(parts.values())).new_zeros(self._outputs)
        for name, part in parts.items():
            vector[self._places[name]] = part
        return vector

    def _rows(self, used: Sequence[tuple[int, Tensor | None, float]], rows: int) -> Tensor | None:
        """[b,T]. One sum after the other: a row's does not depend on how many its neighbours have."""
        present = [(row, vector, weight) for row, vector, weight in used if vector is not None]
        if not present:
            return None
        total = present[0][1].new_zeros(rows, self._outputs)
        for row, vector, weight in present:
            total[row, : len(vector)].add_(vector, alpha=weight)
        return total.to(self._dtype)
