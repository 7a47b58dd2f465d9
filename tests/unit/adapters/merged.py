"""The slow obvious path: what a layer's weights are with adapters merged into them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule, Module


def merged_weight(weight: Tensor, module: Module) -> Tensor:
    """The layer's weight with the module merged at weight 1, in float64: W + D, normed where it is DoRA."""
    total = weight.double()
    if isinstance(module, LoraModule):
        product = module.B.double().flatten(1) @ module.A.double().flatten(1)
        total = total + module.alpha / module.rank * product.reshape(weight.shape)
    elif module.weight is not None:
        total = total + module.weight.double().reshape(weight.shape)
    if (magnitude := module.magnitude) is None:
        return total
    axis = 0 if magnitude.dim() == 1 else 1
    others = [dim for dim in range(total.dim()) if dim != axis]
    shape = [-1 if dim == axis else 1 for dim in range(total.dim())]
    norms = total.square().sum(others, keepdim=True).sqrt()
    return magnitude.double().reshape(shape) * total / norms


@torch.no_grad()
def merge(layer: nn.Module, parts: Sequence[tuple[Module, float]]) -> None:
    """Writes W + sum of weight * (merged - W), and the same for the bias, into the layer."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    base = weight.double()
    weight.copy_(base + sum(w * (merged_weight(weight, module) - base) for module, w in parts))
    added = sum(w * module.bias.double() for module, w in parts if module.bias is not None)
    if isinstance(added, Tensor):
        before = layer.bias if isinstance(layer.bias, Tensor) else torch.zeros_like(added)
        layer.bias = nn.Parameter((before.double() + added).float())
