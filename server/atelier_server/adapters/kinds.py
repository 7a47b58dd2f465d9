"""Kinds of adapters: what a file says of one layer, as one of the two changes that the bank knows.

    LoRA, LoCon    s * up down,  with a core (CP)  s * up (mid down)         low rank r
    LoHa           s * (w1_a w1_b) o (w2_a w2_b),  o entry by entry          low rank r * r
    LoKr           s * w1 (x) w2,  (x) Kronecker's product                   low rank rank(w1) * rank(w2)
    full, norms    diff, diff_b, w_norm, b_norm                              dense

s is alpha / r with r the rank of the file's own factors, and 1 where it has none; `dora_scale` or `magnitude`
(DoRA) and `diff_b` may come with every kind but norms. Names of parts and conventions are those of LyCORIS
(arXiv 2309.14859, lycoris-lora 4.1) and of kohya's scripts.

LoHa and LoKr are low-rank changes exactly: a product of rank p and one of rank q, entry by entry or
Kronecker's, is one of rank p q whose factors are products of theirs. They become one where that rank fits a
slot and is smaller than the difference itself; else they become the difference.

Shapes: r rank, i features in, o features out, k the kernel (nothing for a linear layer).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from atelier_server.adapters.canonical import DenseModule, LoraModule, Module
from atelier_server.errors import AdapterMismatch, UnsupportedFormat

_LORA = frozenset({"lora_up.weight", "lora_down.weight", "lora_mid.weight"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"})
_LOKR = frozenset(f"lokr_{part}{end}" for part in ("w1", "w2") for end in ("", "_a", "_b")) | {"lokr_t2"}
_FULL = frozenset({"diff"})
_NORM = frozenset({"w_norm", "b_norm"})
_MAGNITUDES = frozenset({"dora_scale", "magnitude"})
_WITH_ANY = frozenset({"alpha", "diff_b"}) | _MAGNITUDES
PARTS = _LORA | _LOHA | _LOKR | _FULL | _NORM | _WITH_ANY


def convert(
    name: str, parts: Mapping[str, Tensor], shape: Sequence[int], *, max_rank: int, scale: float | None = None
) -> Module:
    """The change that `parts` (names of `PARTS`) make to the layer `name` whose weight has `shape`.

    `scale` is s where the file's layout tells it outside of `parts` (PEFT); else it follows from `alpha`,
    which counts as r if it is missing. `dora_scale` [o,1,...] scales outputs, [1,i,...] inputs; `magnitude`,
    of PEFT and ai-toolkit, outputs whatever its shape (PEFT's is [1,o,1,1] for a convolution).

    Plain LoRA keeps its tensors as they are; products are made in float32. Raises UnsupportedFormat for parts
    that are missing, unknown or of several kinds, and AdapterMismatch for shapes that do not fit the layer.
    """
    kind = _kind(name, parts)
    try:
        return kind(_Layer(name, parts, tuple(shape), max_rank, scale))
    except _Misfit as error:
        told = ", ".join(f"{part} {tuple(tensor.shape)}" for part, tensor in sorted(parts.items()))
        raise AdapterMismatch(
            f"the adapter's {name} has {told}, which do not fit together or a weight of shape {tuple(shape)}",
            {"module": name},
        ) from error


class _Misfit(Exception):
    """Shapes that do not go together."""


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is known of one layer: the file's parts, and the shape of the base's weight."""

    name: str
    parts: Mapping[str, Tensor]
    shape: tuple[int, ...]
    max_rank: int
    scale: float | None

    @property
    def out(self) -> int:
        return self.shape[0]

    @property
    def features(self) -> int:
        """i * k"""
        return math.prod(self.shape[1:])

    def need(self, part: str) -> Tensor:
        if part not in self.parts:
            raise UnsupportedFormat(f"{self.name} lacks its {part}", {"module": self.name})
        return self.parts[part]

    def alpha(self, rank: int) -> float:
        """alpha over `rank` is the scale."""
        if self.scale is not None:
            return self.scale * rank
        if (alpha := self.parts.get("alpha")) is None:
            return float(rank)
        if alpha.numel() != 1 or not math.isfinite(alpha.item()):
            raise UnsupportedFormat(
                f"the alpha of {self.name} is not one finite number", {"module": self.name}
            )
        return float(alpha.item())

    def magnitude(self) -> Tensor | None:
        """[o] for magnitudes of outputs, [1,i] for those of inputs."""
        if (outputs := self.parts.get("magnitude")) is not None:
            _fit(len(self.shape) >= 2 and outputs.numel() == self.out)
            return outputs.reshape(-1)
        if (magnitude := self.parts.get("dora_scale")) is None:
            return None
        per_output = magnitude.dim() == 1 or magnitude.shape[:1] == self.shape[:1]
        _fit(len(self.shape) >= 2 and magnitude.numel() == self.shape[0 if per_output else 1])
        return magnitude.reshape(-1) if per_output else magnitude.reshape(1, -1)

    def bias(self, part: str = "diff_b") -> Tensor | None:
        """[o]"""
        if (bias := self.parts.get(part)) is None:
            return None
        _fit(bias.numel() == self.out)
        return bias.reshape(self.out)

    def pays(self, rank: int) -> bool:
        """Whether two factors fit a slot and are smaller than their product."""
        return rank <= self.max_rank and rank * (self.out + self.features) < self.out * self.features

    def low_rank(self, b: Tensor, a: Tensor, scale: float) -> LoraModule:
        """The change scale * b a: b [o,R], a [R,i*k]."""
        rank = a.shape[0]
        b = b.reshape(*b.shape, *(1 for _ in self.shape[2:])).contiguous()
        return LoraModule(a.reshape(rank, *self.shape[1:]), b, scale * rank, self.magnitude(), self.bias())

    def dense(self, weight: Tensor) -> DenseModule:
        _fit(weight.numel() == math.prod(self.shape))
        return DenseModule(weight.reshape(self.shape), self.bias(), self.magnitude())


# --------------------------------------------------------------------------------------------------- kinds
def _kind(name: str, parts: Mapping[str, Tensor]) -> Callable[[_Layer], Module]:
    if unknown := parts.keys() - PARTS:
        raise UnsupportedFormat(f"{name} has a part {min(unknown)}, which is not known", {"module": name})
    kinds: list[tuple[str, frozenset[str], Callable[[_Layer], Module]]] = [
        ("LoRA", _LORA, _lora),
        ("LoHa", _LOHA, _loha),
        ("LoKr", _LOKR, _lokr),
        ("a full difference", _FULL, lambda layer: layer.dense(layer.need("diff"))),
        ("a norm", _NORM, _norm),
    ]
    found = [(label, kind) for label, own, kind in kinds if own & parts.keys()]
    if len(found) > 1:
        labels = " and ".join(label for label, _ in found)
        raise UnsupportedFormat(f"{name} is {labels} at once", {"module": name})
    if found:
        return found[0][1]
    if "diff_b" not in parts or _MAGNITUDES & parts.keys():
        raise UnsupportedFormat(f"{name} has no weights beside {', '.join(sorted(parts))}", {"module": name})
    return lambda layer: DenseModule(None, layer.bias())


def _lora(layer: _Layer) -> Module:
    up, down = layer.need("lora_up.weight"), layer.need("lora_down.weight")
    if (mid := layer.parts.get("lora_mid.weight")) is not None:
        # up_op mid_pq down_qi: the core and the inputs' factor make one factor of rank p.
        down = _with_core(mid, _matrix(down), layer.shape[2:])
    rank = down.shape[0] if down.dim() else 0
    _fit(rank >= 1 and _matrix(down).shape[1] == layer.features and _matrix(up).shape == (layer.out, rank))
    return LoraModule(down, up, layer.alpha(rank), layer.magnitude(), layer.bias())


def _loha(layer: _Layer) -> Module:
    (b1, a1), (b2, a2) = (_hadamard_half(layer, number) for number in (1, 2))
    scale = layer.alpha(len(a1)) / len(a1)
    if not layer.pays(len(a1) * len(a2)):
        return layer.dense(scale * ((b1 @ a1) * (b2 @ a2)))
    # (B1 A1) o (B2 A2) = sum over p, q of (b1_p o b2_q)(a1_p o a2_q).
    b = torch.einsum("op,oq->opq", b1, b2).flatten(1)
    return layer.low_rank(b, torch.einsum("pi,qi->pqi", a1, a2).flatten(0, 1), scale)


def _lokr(layer: _Layer) -> Module:
    b1, a1 = _kronecker_half(layer, 1)
    b2, a2 = _kronecker_half(layer, 2)
    # Two whole matrices have no rank and, whatever alpha says, no scale of their own.
    rank = next((len(layer.parts[part]) for part in ("lokr_w1_b", "lokr_w2_b") if part in layer.parts), 0)
    scale = layer.alpha(rank) / rank if rank else (1.0 if layer.scale is None else layer.scale)
    _fit(b1.shape[0] * b2.shape[0] == layer.out and a1.shape[1] * a2.shape[1] == layer.features)
    if not layer.pays(len(a1) * len(a2)):
        return layer.dense(scale * torch.kron(b1 @ a1, b2 @ a2))
    # (B1 A1) (x) (B2 A2) = (B1 (x) B2)(A1 (x) A2); the kernel stays the last, fastest part of A2's axis.
    return layer.low_rank(torch.kron(b1, b2), torch.kron(a1, a2), scale)


def _norm(layer: _Layer) -> Module:
    if others := layer.parts.keys() - _NORM:
        raise UnsupportedFormat(f"{layer.name} is a norm with {min(others)}", {"module": layer.name})
    weight = layer.bias("w_norm")
    _fit(len(layer.shape) == 1)
    return DenseModule(weight, layer.bias("b_norm"))


# ------------------------------------------------------------------------------------------------- factors
def _hadamard_half(layer: _Layer, number: int) -> tuple[Tensor, Tensor]:
    """B [o,r] and A [r,i*k] of one half of a LoHa."""
    b, a = (_matrix(layer.need(f"hada_w{number}_{side}")) for side in "ab")
    if (core := layer.parts.get(f"hada_t{number}")) is not None:
        # sum over p, q of wa_po t_pq wb_qi: with a core both factors are stored rank first.
        b, a = b.t(), _matrix(_with_core(core, a, layer.shape[2:]))
    _fit(b.shape == (layer.out, len(a)) and a.shape[1] == layer.features and len(a) >= 1)
    return b, a


def _kronecker_half(layer: _Layer, number: int) -> tuple[Tensor, Tensor]:
    """B [b,p] and A [p,d*k] of one side of a LoKr; a whole matrix is itself times the identity."""
    if (whole := layer.parts.get(f"lokr_w{number}")) is not None:
        matrix = _matrix(whole)
        rows, columns = matrix.shape
        identity = torch.eye(min(rows, columns), device=matrix.device)
        return (identity, matrix) if rows <= columns else (matrix, identity)
    b, a = (_matrix(layer.need(f"lokr_w{number}_{side}")) for side in "ab")
    if (core := layer.parts.get(f"lokr_t{number}")) is not None:
        b, a = b.t().contiguous(), _matrix(_with_core(core, a, layer.shape[2:]))
    _fit(b.shape[1] == len(a) >= 1)
    return b, a


def _with_core(core: Tensor, factor: Tensor, kernel: tuple[int, ...]) -> Tensor:
    """The core [p,q,*k] times the inputs' factor [q,i] -> [p,i,*k]."""
    _fit(core.dim() >= 2 and core.shape[1] == factor.shape[0] and tuple(core.shape[2:]) == kernel)
    return torch.einsum("pq...,qi->pi...", core.float(), factor)


def _matrix(tensor: Tensor) -> Tensor:
    """[a,b,...] -> [a,b*...], float32."""
    _fit(tensor.dim() >= 2)
    return tensor.float().flatten(1)


def _fit(condition: bool) -> None:
    if not condition:
        raise _Misfit
