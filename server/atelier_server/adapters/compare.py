"""Two adapters side by side: what they change, by how much, and how alike the changes are."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

from torch import nn

from atelier_server.adapters.algebra import changes_of, dot
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule, Module
from atelier_server.adapters.report import block_of
from atelier_server.report import AdapterComparison, BlockComparison, ModuleComparison


def compare(
    a: CanonicalAdapter, b: CanonicalAdapter, layer_of: Callable[[str], nn.Module]
) -> AdapterComparison:
    """`layer_of` finds a layer of the base by name; both adapters must fit it."""
    common = sorted(a.modules.keys() & b.modules.keys())
    sums: defaultdict[str, _Sums] = defaultdict(_Sums)
    for name in sorted(a.modules.keys() | b.modules.keys()):
        layer = layer_of(name)
        mine = dict(changes_of(a.modules[name], layer)) if name in a.modules else {}
        others = dict(changes_of(b.modules[name], layer)) if name in b.modules else {}
        for sum_ in (sums[block_of(name)], sums[""]):
            sum_.a += sum(dot(change, change) for change in mine.values())
            sum_.b += sum(dot(change, change) for change in others.values())
            sum_.ab += sum(dot(mine[part], others[part]) for part in mine.keys() & others.keys())
    whole = sums.pop("", _Sums())
    return AdapterComparison(
        only_a=tuple(sorted(a.modules.keys() - b.modules.keys())),
        only_b=tuple(sorted(b.modules.keys() - a.modules.keys())),
        differing=tuple(
            ModuleComparison(name, *_told(a.modules[name]), *_told(b.modules[name]))
            for name in common
            if _told(a.modules[name]) != _told(b.modules[name])
        ),
        common=len(common),
        blocks=tuple(sums[block].told(block) for block in sorted(sums)),
        whole=whole.told(""),
    )


class _Sums:
    """Squared norms of both changes and their product."""

    def __init__(self) -> None:
        self.a = self.b = self.ab = 0.0

    def told(self, block: str) -> BlockComparison:
        scale = math.sqrt(self.a * self.b)
        return BlockComparison(
            block,
            norm_a=math.sqrt(max(self.a, 0.0)),
            norm_b=math.sqrt(max(self.b, 0.0)),
            norm_difference=math.sqrt(max(self.a + self.b - 2 * self.ab, 0.0)),
            cosine=max(-1.0, min(1.0, self.ab / scale)) if scale else None,
        )


def _told(module: Module) -> tuple[str, int, float]:
    """Kind, rank and alpha; 0 for a difference."""
    kind = "dora" if module.magnitude is not None else "lora" if isinstance(module, LoraModule) else "full"
    return (kind, module.rank, module.alpha) if isinstance(module, LoraModule) else (kind, 0, 0.0)
