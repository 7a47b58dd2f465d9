"""The slot bank: every adapter on the device, and which row of the next forward uses which of them.

    bank = SlotBank(slots=16, max_rank=64)
    bank.wrap(unet, "unet")
    bank.load(1, adapter)
    rows = bank.gather([[(1, 1.0)], [], [(1, 0.5), (2, 0.8)]])   # three rows; copied now, once
    with bank.use(rows):
        unet(...)                                                # a forward of three rows
    with bank.train(leaves):
        loss(unet(...)).backward()                               # forward and backward, both inside

Text encoders are wrapped as well, and gathered for by themselves: a row's text is encoded once, before its
first step. What follows holds for each component.

Guarantees: base weights are never written; a row's bits do not depend on its neighbours' adapters, ranks or
number of adapters (at the same number of rows); a NaN in a slot reaches only the rows that use it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import nn

from atelier_server.adapters.canonical import (
    CanonicalAdapter,
    LoraModule,
    finite,
    tensors_of,
)
from atelier_server.adapters.content import Content, packed_rank
from atelier_server.adapters.differences import Differences
from atelier_server.adapters.layers import (
    BankLayer,
    Current,
    Delta,
    NormDelta,
    RowDelta,
    single_row,
)
from atelier_server.adapters.leaves import LeafSet, shared
from atelier_server.adapters.slots import GroupKey, SlotGroup, component_of, group_key
from atelier_server.adapters.words import (
    BankEmbedding,
    Tokens,
    Words,
    check_tokens,
    resident,
    words_of,
)
from atelier_server.adapters.wrapping import Wrapping
from atelier_server.errors import AdapterMismatch

Row = tuple[tuple[int, float], ...]
RowsKey = tuple[tuple[tuple[int, int, float], ...], ...]
UNET = ("unet",)
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class ActiveRows:
    """A batch's adapters, gathered: an immutable copy, right for as long as it is held.

    `key` tells whether a later request for the same rows would gather the same (`SlotBank.key`).
    """

    rows: int
    key: RowsKey
    deltas: Mapping[str, Delta]
    norms: Mapping[str, NormDelta]


class SlotBank:
    """`slots` adapters of rank `max_rank` or less, in slots 1 to `slots`; slot 0 comes on top, always empty.

    Not thread-safe: one thread runs the device.
    """

    def __init__(self, *, slots: int, max_rank: int) -> None:
        self.slots = slots
        self.max_rank = max_rank
        self._current = Current()
        self._wrapping = Wrapping(self._current)
        self.layers = self._wrapping.layers
        self.shapes = self._wrapping.shapes
        self._vocabularies = self._wrapping.vocabularies
        self._differences: dict[str, Differences] = {}
        self._alike: dict[GroupKey, list[BankLayer]] = {}
        self._groups: dict[GroupKey, SlotGroup] = {}
        self._held = [Content()] * (slots + 1)
        self._training = False

    def wrap(self, root: nn.Module, prefix: str) -> None:
        """Takes in a component of the base: see `Wrapping.wrap`."""
        added = self._wrapping.wrap(root, prefix)
        self._differences[prefix] = Differences()
        for layer in added:
            self._differences[prefix].add_layer(layer.layer_name, layer.weight)
            self._alike.setdefault(group_key(layer), []).append(layer)

    def layer(self, name: str) -> nn.Module:
        """The layer or norm of that name, one of `shapes`."""
        return self._wrapping.layer(name)

    # ------------------------------------------------------------------------------------------ content
    def check(self, adapter: CanonicalAdapter) -> None:
        """Raises AdapterMismatch that names the first layer which does not fit or is not finite."""
        self._check_shapes(adapter)
        for placeholder, vectors in ((p, v) for p, by in adapter.tokens.items() for v in by.values()):
            if not finite(vectors):
                raise AdapterMismatch(f"the token {placeholder} has values that are not finite")
        for name, module in adapter.modules.items():
            if not all(finite(tensor) for _, tensor in tensors_of(module)):
                raise AdapterMismatch(
                    f"the adapter has values in {name} that are not finite", {"module": name}
                )

    def load(self, slot: int, adapter: CanonicalAdapter) -> None:
        """Copies `adapter` into the slot in place of what it held. Rows gathered before keep the old weights.

        Raises AdapterMismatch, with the slot untouched, if names or shapes do not fit.
        """
        held = self._slot(slot)
        self._check_shapes(adapter)
        # All memory first: running out of it leaves the slot as it was.
        changes = {name: self._wrapping.change(name, module) for name, module in adapter.modules.items()}
        pairs = {name: change.low_rank for name, change in changes.items() if change.low_rank is not None}
        grouped = [(self._group(key), modules) for key, modules in self._grouped(pairs).items()]
        rest = {
            component: differences.packed(
                {name: change for name, change in changes.items() if component_of(name) == component}
            )
            for component, differences in self._differences.items()
        }
        tokens = resident(adapter.tokens, self._vocabularies)
        scales = {name: module.alpha / module.rank for name, module in pairs.items()}
        for group in self._groups.values():
            group.erase(slot)
        self._held[slot] = held = Content.of(adapter, scales, tokens, held.revision + 1)
        with torch.no_grad():
            for group, modules in grouped:
                group.write(slot, modules, {name: scales[name] / held.scale for name in modules})
        for component, differences in self._differences.items():
            differences.put(slot, rest[component])
            if rest[component] is not None:
                _log.info("slot %d: %s", slot, rest[component])

    def clear(self, slot: int) -> None:
        """Empties the slot."""
        held = self._slot(slot)
        for group in self._groups.values():
            group.erase(slot)
        for differences in self._differences.values():
            differences.put(slot, None)
        self._held[slot] = Content(held.revision + 1)

    def changes(self, slot: int, components: Sequence[str]) -> bool:
        """Whether the adapter in the slot changes any of these, or has words for them."""
        held = self._slot(slot)
        return held.changes(components) or held.speaks_to(components)

    @property
    def size_bytes(self) -> int:
        """Memory of all slots."""
        pairs = sum(group.size_bytes for group in self._groups.values())
        return pairs + sum(differences.size_bytes for differences in self._differences.values())

    # --------------------------------------------------------------------------------------------- rows
    def key(self, rows: Sequence[Sequence[tuple[int, float]]], components: Sequence[str] = UNET) -> RowsKey:
        """Equal for equal weights in every row: slots with their revisions, in canonical order."""
        return tuple(
            tuple(
                (slot, self._held[slot].revision, weight) for slot, weight in self._canonical(row, components)
            )
            for row in rows
        )

    def gather(
        self, rows: Sequence[Sequence[tuple[int, float]]], components: Sequence[str] = UNET
    ) -> ActiveRows:
        """Copies what each row's (slot, weight) pairs name; an empty row is the base alone.

        The copy costs, the forwards after it do not: keep the result while `key(rows)` stays the same.
        """
        canonical = [self._canonical(row, components) for row in rows]
        ranks = [sum(self._held[slot].rank(components) for slot, _ in row) for row in canonical]
        packed = [self._pack(row, packed_rank(max(ranks, default=0)), components) for row in canonical]
        index = torch.tensor([i for indices, _ in packed for i in indices])
        # Most adapters are used as they are: nothing to scale, and padding is zeros already.
        plain = all(weight * self._held[slot].scale == 1.0 for row in canonical for slot, weight in row)
        factors = None if plain else torch.tensor([[f] for _, values in packed for f in values])
        used = {slot for row in canonical for slot, _ in row}
        pairs: dict[str, RowDelta] = {}
        for group in (group for key, group in self._groups.items() if key[2] in components):
            index = index.to(group.A.device)  # once: one device
            factors = None if factors is None else factors.to(group.A.device)
            pairs |= group.gather(used, index, factors, len(canonical))
        deltas: dict[str, Delta] = dict(pairs)
        norms: dict[str, NormDelta] = {}
        for component, differences in self._differences.items():
            if component in components:
                mixed, changed = differences.gather(canonical, pairs)
                deltas |= mixed
                norms |= changed
        key = self.key(rows, components)
        return ActiveRows(len(canonical), key, MappingProxyType(deltas), MappingProxyType(norms))

    def alone(self, adapter: CanonicalAdapter) -> tuple[ActiveRows, Words]:
        """One row with `adapter` at weight 1, in all components, and its words; it takes no slot.

        Raises AdapterMismatch if names or shapes do not fit.
        """
        self._check_shapes(adapter)
        changes = {name: self._wrapping.change(name, module) for name, module in adapter.modules.items()}
        pairs = {
            name: single_row(change.low_rank, self.layers[name].weight)
            for name, change in changes.items()
            if change.low_rank is not None
        }
        deltas: dict[str, Delta] = dict(pairs)
        norms: dict[str, NormDelta] = {}
        for component, differences in self._differences.items():
            own = {name: change for name, change in changes.items() if component_of(name) == component}
            mixed, changed = differences.alone(own, pairs)
            deltas |= mixed
            norms |= changed
        active = ActiveRows(1, (), MappingProxyType(deltas), MappingProxyType(norms))
        return active, self.spoken(adapter.tokens)

    def words(self, row: Sequence[tuple[int, float]]) -> Words:
        """The learned tokens of a row's adapters; their weights do not scale them.

        Raises AdapterMismatch where two of the adapters have the same placeholder.
        """
        used = [slot for slot, _ in self._ordered(row) if self._held[slot].tokens]
        return words_of([self._held[slot].tokens for slot in used], self._vocabularies)

    def vocabulary(self, encoder: str) -> BankEmbedding:
        """Of a text encoder that was wrapped."""
        return self._vocabularies[encoder]

    def spoken(self, tokens: Tokens) -> Words:
        """The words of tokens that lie in no slot. Within the graph of their vectors."""
        return words_of([resident(tokens, self._vocabularies)], self._vocabularies)

    @contextmanager
    def use(self, rows: ActiveRows | None, words: Words | None = None) -> Iterator[None]:
        """Forwards inside have these rows, and texts these words; None = the base alone.

        RuntimeError inside `train`.
        """
        if self._training:
            raise RuntimeError("rows cannot be activated between a training's forward and its backward")
        current = self._current
        before = current.deltas, current.norms, current.words
        current.activate(*((rows.deltas, rows.norms) if rows is not None else ({}, {})))
        current.words = words.vectors if words is not None else {}
        try:
            yield
        finally:
            current.activate(*before[:2])
            current.words = before[2]

    @contextmanager
    def train(self, leaves: LeafSet | Sequence[LeafSet | None], words: Words | None = None) -> Iterator[None]:
        """Forwards inside have trainable weights: one set for all rows, or one a row (None: the base alone).

        Texts have these words. The backward belongs inside too: with gradient checkpointing it runs the
        forward again, and with other rows active it would be silently wrong. Only what runs without (text
        encoders do) may be followed by its backward later. Activating anything inside raises RuntimeError.
        """
        current = self._current
        if self._training or current.deltas or current.norms or current.words:
            raise RuntimeError("a training cannot begin while other rows are active")
        self._training = True
        current.activate(leaves.leaves if isinstance(leaves, LeafSet) else shared(leaves), {})
        current.words = words.vectors if words is not None else {}
        try:
            yield
        finally:
            current.activate({}, {})
            current.words = {}
            self._training = False

    # ---------------------------------------------------------------------------------------- internals
    def _slot(self, slot: int) -> Content:
        if not 1 <= slot <= self.slots:
            raise IndexError(f"slot {slot} is none of 1 to {self.slots}")
        return self._held[slot]

    def _canonical(self, row: Sequence[tuple[int, float]], components: Sequence[str]) -> Row:
        """The slots of a row that change these components, each once, in order."""
        ordered = self._ordered(row)
        return tuple((slot, weight) for slot, weight in ordered if self._held[slot].changes(components))

    def _ordered(self, row: Sequence[tuple[int, float]]) -> Row:
        """Every slot once, in an order that follows from what the slots hold and not from where it lies.

        The order decides the order of summation and so the last bits; slot numbers differ between runs.
        """
        weights: dict[int, float] = {}
        for slot, weight in row:
            if not math.isfinite(weight):
                raise ValueError(f"weight {weight} of slot {slot} is not finite")
            self._slot(slot)
            weights[slot] = weights.get(slot, 0.0) + weight
        kept = [(slot, weight) for slot, weight in weights.items() if weight != 0.0]
        return tuple(sorted(kept, key=lambda pair: (self._held[pair[0]].fingerprint, pair[1], pair[0])))

    def _pack(self, row: Row, ranks: int, components: Sequence[str]) -> tuple[list[int], list[float]]:
        """Of each packed rank, its place in the buffers and its factor."""
        index: list[int] = []
        factors: list[float] = []
        for slot, weight in row:
            rank = self._held[slot].rank(components)
            index += range(slot * self.max_rank, slot * self.max_rank + rank)
            factors += [weight * self._held[slot].scale] * rank
        # Padding reads slot 0, which is zero: a factor of 0 on another slot's NaN would be NaN.
        missing = ranks - len(index)
        return index + [0] * missing, factors + [0.0] * missing

    def _group(self, key: GroupKey) -> SlotGroup:
        """The slots of these layers, allocated when an adapter first has one of them."""
        if key not in self._groups:
            self._groups[key] = SlotGroup(self._alike[key], self.slots + 1, self.max_rank)
        return self._groups[key]

    def _grouped(self, modules: Mapping[str, LoraModule]) -> dict[GroupKey, dict[str, LoraModule]]:
        grouped: dict[GroupKey, dict[str, LoraModule]] = {}
        for name, module in modules.items():
            grouped.setdefault(group_key(self.layers[name]), {})[name] = module
        return grouped

    def _check_shapes(self, adapter: CanonicalAdapter) -> None:
        check_tokens(adapter.tokens, self._vocabularies)
        self._wrapping.check(adapter.modules, self.max_rank)
