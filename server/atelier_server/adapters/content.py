"""What a slot of the bank holds beside its tensors, and in which order adapters of one row add up."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule, tensors_of
from atelier_server.adapters.slots import component_of
from atelier_server.adapters.words import Tokens

_FINGERPRINTED_LAYERS = 8
_FINGERPRINTED_VALUES = 16


@dataclass(frozen=True, slots=True)
class Content:
    """What a slot holds. `scale` is alpha/r of most of its layers; the others differ by a factor inside B.

    `ranks`: the largest rank in each component that the adapter changes, 0 where it changes no pair.
    """

    revision: int = 0
    ranks: Mapping[str, int] = field(default_factory=dict)
    scale: float = 1.0
    fingerprint: bytes = b""
    tokens: Tokens = field(default_factory=dict)

    @classmethod
    def of(
        cls, adapter: CanonicalAdapter, scales: Mapping[str, float], tokens: Tokens, revision: int
    ) -> Content:
        """`scales`: alpha/r by low-rank module; `tokens`: the adapter's, on the device."""
        ranks: dict[str, int] = {}
        for name, module in adapter.modules.items():
            component, rank = component_of(name), module.rank if isinstance(module, LoraModule) else 0
            ranks[component] = max(rank, ranks.get(component, 0))
        common = Counter(scale for scale in scales.values() if scale).most_common(1)
        return cls(revision, ranks, common[0][0] if common else 1.0, fingerprint(adapter), tokens)

    def rank(self, components: Sequence[str]) -> int:
        return max((self.ranks.get(component, 0) for component in components), default=0)

    def changes(self, components: Sequence[str]) -> bool:
        return not self.ranks.keys().isdisjoint(components)

    def speaks_to(self, components: Sequence[str]) -> bool:
        """Whether it has words for one of these."""
        return any(encoder in components for encoders in self.tokens.values() for encoder in encoders)


def packed_rank(rank: int) -> int:
    """16, 32, 64, then multiples of 64.

    From 16 up, padding with zeros does not change a row's bits (measured; with 8 it does): so they do not
    depend on the ranks of its neighbours.
    """
    return next((size for size in (16, 32) if rank <= size), -(-rank // 64) * 64)


def fingerprint(adapter: CanonicalAdapter) -> bytes:
    """Tells adapters apart by a little of their content, cheaply; equal content gives equal bytes."""
    digest = hashlib.blake2b(digest_size=16)

    def sample(tensor: Tensor) -> str:
        values = tensor.detach().flatten()[:_FINGERPRINTED_VALUES]
        return f"{tuple(tensor.shape)} {values.double().tolist()}"

    names = sorted(adapter.modules)
    # From all over the base: adapters may share their text encoders' part.
    for name in names[:: max(1, len(names) // _FINGERPRINTED_LAYERS)]:
        module = adapter.modules[name]
        digest.update(f"{name} {module.alpha if isinstance(module, LoraModule) else 1}".encode())
        for _, tensor in tensors_of(module):
            digest.update(sample(tensor).encode())
    for placeholder in sorted(adapter.tokens):
        for encoder, vectors in sorted(adapter.tokens[placeholder].items()):
            digest.update(f"{placeholder} {encoder} {sample(vectors)}".encode())
    return digest.digest()
