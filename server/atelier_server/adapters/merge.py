"""Several adapters with weights as one: exactly, or the nearest of a given rank.

Exactly, the pairs of a layer are laid side by side (their ranks add up) and differences are added. A layer
that mixes the two, or DoRA beside anything, has no exact form: it takes a rank, and is then the singular
value decomposition of the whole change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn

from atelier_server.adapters.algebra import Change, Pair, dot, module_of, nearest, total, weight_change
from atelier_server.adapters.canonical import CanonicalAdapter, DenseModule, LoraModule, Module
from atelier_server.errors import AdapterMismatch, InvalidRequest, Violation


@dataclass(frozen=True, slots=True, eq=False)
class Ingredient:
    """An adapter, by the reference that its user gave, and how much of it is taken."""

    label: str
    adapter: CanonicalAdapter
    weight: float


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """`kept`: the share of the change's squared norm, over all layers, that the ranks could hold."""

    adapter: CanonicalAdapter
    kept: float


def merge(
    ingredients: Sequence[Ingredient],
    layer_of: Callable[[str], nn.Module],
    *,
    rank: int | None,
    max_rank: int,
) -> Merged:
    """One adapter whose change is the weighted sum of the ingredients'; of at most `rank` if given.

    `layer_of` finds a layer of the base by name; what the adapters change must fit it. Raises InvalidRequest
    for a sum that has no exact form, AdapterMismatch for adapters that do not go together.
    """
    families = {part.adapter.family: part.label for part in ingredients if part.adapter.family}
    if len(families) > 1:
        told = ", ".join(f"{label} is of {family}" for family, label in sorted(families.items()))
        raise AdapterMismatch(f"these adapters are of different families: {told}")
    present = [part for part in ingredients if part.weight]
    names = sorted({name for part in present for name in part.adapter.modules})
    modules: dict[str, Module] = {}
    kept = square = 0.0
    for name in names:
        terms = [
            Ingredient(part.label, CanonicalAdapter({name: part.adapter.modules[name]}), part.weight)
            for part in present
            if name in part.adapter.modules
        ]
        layer = _Layer(name, layer_of(name), terms)
        modules[name], layer_kept, layer_square = layer.merged(rank, max_rank)
        kept, square = kept + layer_kept, square + layer_square
    tokens = _tokens(present)
    if not modules and not tokens:
        raise InvalidRequest.of([Violation("adapters", "nothing would be left: every weight is 0")])
    triggers = tuple(dict.fromkeys(word for part in present for word in part.adapter.triggers))
    source = {"merged_from": ", ".join(f"{part.label}:{part.weight:g}" for part in ingredients)}
    adapter = CanonicalAdapter(modules, tokens, triggers, source, next(iter(families), ""))
    return Merged(adapter, kept / square if square else 1.0)


class _Layer:
    """The terms of one layer's sum."""

    def __init__(self, name: str, layer: nn.Module, terms: Sequence[Ingredient]) -> None:
        self._name = name
        self._layer = layer
        self._terms = [(part.label, part.adapter.modules[name], part.weight) for part in terms]

    def merged(self, rank: int | None, max_rank: int) -> tuple[Module, float, float]:
        """The sum, the squared norm that it has kept, and that of the whole change."""
        changes = self._changes()
        change = total(changes) if changes else None
        square = 0.0 if change is None else dot(change, change)
        if (exact := self._exact(rank, max_rank)) is not None:
            return exact, square, square
        if rank is None or change is None:
            raise InvalidRequest.of(
                [Violation("rank", f"{self._reason(max_rank)}: give a rank to merge by approximation")]
            )
        pair, kept = nearest(change, rank)
        return module_of(pair, self._shape, self._bias()), kept, square

    def _exact(self, rank: int | None, max_rank: int) -> Module | None:
        modules = [module for _, module, _ in self._terms]
        if all(isinstance(m, DenseModule) and m.magnitude is None for m in modules):
            is_norm = not isinstance(self._layer, nn.Linear | nn.Conv2d)
            if rank is None or is_norm or all(_is_pair(m) for m in modules):
                return self._differences()
        ranks = sum(module.rank for module in modules if isinstance(module, LoraModule))
        if ranks > (max_rank if rank is None else rank):
            return None
        if len(modules) == 1 and isinstance(modules[0], LoraModule):
            return self._alone(modules[0])
        if not all(_is_pair(m) for m in modules):
            return None
        pair = total(self._changes())
        assert isinstance(pair, Pair)
        return module_of(pair, self._shape, self._bias())

    def _alone(self, module: LoraModule) -> Module | None:
        """The only term with its very tensors, if its weight can be folded into it."""
        [(_, _, weight)] = self._terms
        if module.magnitude is not None:
            return module if weight == 1 else None
        return replace(module, alpha=module.alpha * weight, bias=self._bias())

    def _reason(self, max_rank: int) -> str:
        """Why there is no exact form."""
        for label, module, _ in self._terms:
            if module.magnitude is not None:
                return f"{label} is DoRA in {self._name}, which has no exact weighted sum"
            if not _is_pair(module):
                return f"{label} is a full difference in {self._name}, which has no exact sum with a LoRA"
        ranks = sum(module.rank for _, module, _ in self._terms if isinstance(module, LoraModule))
        return f"the ranks of {self._name} add up to {ranks}, and this server takes {max_rank}"

    @property
    def _shape(self) -> tuple[int, ...]:
        weight = self._layer.weight
        assert isinstance(weight, Tensor)
        return tuple(weight.shape)

    def _changes(self) -> list[tuple[Change, float]]:
        found = ((weight_change(module, self._layer), weight) for _, module, weight in self._terms)
        return [(change, weight) for change, weight in found if change is not None]

    def _differences(self) -> DenseModule:
        parts = [
            (module.weight.float().reshape(self._shape), weight)
            for _, module, weight in self._terms
            if isinstance(module, DenseModule) and module.weight is not None
        ]
        return DenseModule(_sum(parts), self._bias())

    def _bias(self) -> Tensor | None:
        return _sum([(m.bias.float(), weight) for _, m, weight in self._terms if m.bias is not None])


def _sum(parts: Sequence[tuple[Tensor, float]]) -> Tensor | None:
    if not parts:
        return None
    first, weight = parts[0]
    result = first * weight
    for tensor, weight in parts[1:]:
        result = result + tensor * weight
    return result


def _is_pair(module: Module) -> bool:
    """Whether its change of the weight, if it has one, is a pair of factors."""
    return module.magnitude is None and (isinstance(module, LoraModule) or module.weight is None)


def _tokens(ingredients: Sequence[Ingredient]) -> dict[str, dict[str, Tensor]]:
    """All learned tokens. A token has no weight: it is taken whole."""
    tokens: dict[str, dict[str, Tensor]] = {}
    owners: dict[str, str] = {}
    for part in ingredients:
        for placeholder, vectors in part.adapter.tokens.items():
            if placeholder in tokens:
                raise AdapterMismatch(
                    f"{owners[placeholder]} and {part.label} both have a learned token {placeholder!r}"
                )
            tokens[placeholder] = dict(vectors)
            owners[placeholder] = part.label
    return tokens
