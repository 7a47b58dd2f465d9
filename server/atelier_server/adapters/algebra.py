"""Changes of layers as matrices: sums, products, and the nearest pair of factors of a given rank.

Shapes: o features out, f = i * k features in with the kernel, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule, Module
from atelier_server.adapters.changes import change_of, full

_OVERSAMPLING, _POWER_ITERATIONS = 16, 12
_ROUNDING = 1e-6  # of the largest singular value


@dataclass(frozen=True, slots=True, eq=False)
class Pair:
    """The matrix b a: b [o,R], a [R,f], float64."""

    b: Tensor
    a: Tensor


# A matrix [o,f], whole or as its factors.
Change = Pair | Tensor


def weight_change(module: Module, layer: nn.Module) -> Change | None:
    """W' - W at weight 1 for a layer of the base; None where `module` changes the bias alone."""
    if isinstance(module, LoraModule) and module.magnitude is None:
        return Pair(
            module.alpha / module.rank * module.B.detach().double().flatten(1).cpu(),
            module.A.detach().double().flatten(1).cpu(),
        )
    if not isinstance(module, LoraModule) and module.magnitude is None:
        return None if module.weight is None else _matrix(module.weight)
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    change, weight = change_of(module, layer), _matrix(full(layer.weight))
    # Of DoRA: what the bank adds at weight 1, as one matrix.
    total = torch.zeros_like(weight)
    if change.gain is not None:
        total += change.gain.cpu()[:, None] * weight
    if change.difference is not None and change.difference.weight is not None:
        own = full(change.difference.weight)
        total += _matrix(own if change.difference.inputs is None else own * change.difference.inputs)
    if (pair := change.low_rank) is not None:
        total += pair.alpha / pair.rank * (_matrix(pair.B) @ _matrix(pair.A))
    return total


def changes_of(module: Module, layer: nn.Module) -> Iterator[tuple[str, Change]]:
    """All that `module` changes: "weight", and "bias" as a matrix [o,1]."""
    if (change := weight_change(module, layer)) is not None:
        yield "weight", change
    if module.bias is not None:
        yield "bias", _matrix(module.bias)


def total(parts: Sequence[tuple[Change, float]]) -> Change:
    """The weighted sum; one pair where all are pairs."""
    pairs = [(change, weight) for change, weight in parts if isinstance(change, Pair)]
    if len(pairs) == len(parts):
        return Pair(torch.cat([w * p.b for p, w in pairs], 1), torch.cat([p.a for p, _ in pairs]))
    return sum((w * whole(change) for change, w in parts), start=torch.zeros(()))


def whole(change: Change) -> Tensor:
    """[o,f], float32."""
    return (change.b @ change.a).float() if isinstance(change, Pair) else change


def dot(x: Change, y: Change) -> float:
    """The sum of the products, entry by entry; without making the matrix of a pair."""
    if isinstance(x, Pair) and isinstance(y, Pair):
        return float(((x.b.T @ y.b) * (x.a @ y.a.T)).sum())
    if isinstance(x, Pair):
        x, y = y, x
    assert isinstance(x, Tensor)
    if isinstance(y, Pair):
        return float((y.b * (x.double() @ y.a.T)).sum())
    return float((x.double() * y.double()).sum())


def nearest(change: Change, rank: int) -> tuple[Pair, float]:
    """The pair of at most `rank` that is nearest (Eckart and Young), and the square of its norm.

    Exact for pairs and small matrices; large ones by subspace iteration (Halko et al., arXiv 0909.4061) from
    a fixed seed. Ranks that hold rounding only are left out; the singular values are split evenly.
    """
    if isinstance(change, Pair):
        left, core_left = torch.linalg.qr(change.b)
        right, core_right = torch.linalg.qr(change.a.T)
        u, values, vh = torch.linalg.svd(core_left @ core_right.T, full_matrices=False)
        u, vh = left @ u, vh @ right.T
    elif 2 * (rank + _OVERSAMPLING) >= min(change.shape):
        u, values, vh = torch.linalg.svd(change, full_matrices=False)
    else:
        basis = _range(change, rank + _OVERSAMPLING)
        u, values, vh = torch.linalg.svd(basis.T @ change, full_matrices=False)
        u = basis @ u
    rank = max(1, min(rank, int((values > _ROUNDING * values[0]).sum())))
    roots = values[:rank].sqrt()
    pair = Pair((u[:, :rank] * roots).double(), (roots[:, None] * vh[:rank]).double())
    return pair, float(values[:rank].double().square().sum())


def _range(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis [o,size] of the directions in which the matrix is largest."""
    # A generator of its own: the same matrix gives the same factors, and nobody else's numbers move.
    start = torch.randn(matrix.shape[1], size, generator=torch.Generator().manual_seed(0))
    basis: Tensor = torch.linalg.qr(matrix @ start.to(matrix.device))[0]
    for _ in range(_POWER_ITERATIONS):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis)[0])[0]
    return basis


def module_of(pair: Pair, shape: Sequence[int], bias: Tensor | None = None) -> LoraModule:
    """The pair as a module of a layer whose weight has `shape`, float32 on the CPU, at scale 1."""
    rank = pair.a.shape[0]
    a = pair.a.float().cpu().reshape(rank, *shape[1:]).contiguous()
    b = pair.b.float().cpu().reshape(shape[0], rank, *(1 for _ in shape[2:])).contiguous()
    return LoraModule(a, b, float(rank), bias=bias)


def _matrix(tensor: Tensor) -> Tensor:
    """[o,f], float32, on the CPU."""
    tensor = tensor.detach().float().cpu()
    return tensor[:, None] if tensor.dim() == 1 else tensor.flatten(1)
