"""What one adapter changes in one layer, worked out when it is loaded.

Every change is linear in the adapter's weight w: W + w (W' - W), so that compositions are sums.

    LoRA              W' = W + s B A                                 y + s B A x
    DoRA of outputs   W' = d V,  V = W + s B A,  d = m / norm(V)     y + (d - 1)(y - b) + s (d B) A x
    DoRA of inputs    W' = V d                                       y + W (d - 1) x + s B (A d) x
    difference        W' = W + D                                     y + D x

So DoRA is LoRA with other factors, `low_rank`, and one multiplication of outputs that are there already (a
`gain` and a `shift` an output feature), or for inputs a second product with the base's own weights.

Shapes: i features in, o features out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule, Module


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """Added to a layer's output: `weight`, of the shape of the layer's, times its inputs.

    The inputs are first multiplied with `inputs` if given: [i], or [i,1,1] before a convolution. Norms have a
    `bias` here; other layers have a shift.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    inputs: Tensor | None = None

    @property
    def size_bytes(self) -> int:
        """Of its own: with `inputs` the weight is the base's."""
        own = (self.inputs, self.bias) if self.inputs is not None else (self.weight, self.bias)
        return sum(tensor.nbytes for tensor in own if tensor is not None)


@dataclass(frozen=True, slots=True, eq=False)
class LayerChange:
    """One adapter's change of one layer at weight 1. `gain`, what outputs grow by, and `shift` are [o]."""

    low_rank: LoraModule | None = None
    gain: Tensor | None = None
    shift: Tensor | None = None
    difference: Difference | None = None


def full(weight: Tensor) -> Tensor:
    """The matrix that a layer multiplies with, for arithmetic: of a quantised one (torchao's) a copy."""
    return weight.dequantize() if hasattr(weight, "__tensor_flatten__") else weight


def change_of(module: Module, layer: nn.Linear | nn.Conv2d) -> LayerChange:
    """The change that `module` makes to `layer`, on the layer's device. Plain LoRA comes back as it is."""
    if isinstance(module, LoraModule) and module.magnitude is None and module.bias is None:
        return LayerChange(module)
    with torch.no_grad():
        return _change_of(module, layer)


def _change_of(module: Module, layer: nn.Linear | nn.Conv2d) -> LayerChange:
    device = layer.weight.device
    shift = None if module.bias is None else module.bias.to(device, torch.float32)
    if isinstance(module, LoraModule):
        if module.magnitude is None:
            return LayerChange(replace(module, bias=None), shift=shift)
        a, b = module.A.to(device, torch.float32), module.B.to(device, torch.float32)
        pair = LoraModule(a, b, module.alpha)
        product = pair.alpha / pair.rank * (b.flatten(1) @ a.flatten(1))
        return _dora(pair, layer, product, module.magnitude.to(device, torch.float32), shift)
    if module.weight is None:
        return LayerChange(shift=shift)
    change = module.weight.to(device, torch.float32).reshape(layer.weight.shape)
    if module.magnitude is not None:
        weight = full(layer.weight).float()
        total = weight + change
        scale = _scale(total, module.magnitude.to(device, torch.float32))
        change = total * _along(scale, module.magnitude.dim() - 1, total.dim()) - weight
    return LayerChange(shift=shift, difference=Difference(change.to(layer.weight.dtype)))


def _dora(
    pair: LoraModule, layer: nn.Linear | nn.Conv2d, product: Tensor, magnitude: Tensor, shift: Tensor | None
) -> LayerChange:
    weight = layer.weight
    scale = _scale(full(weight).float() + product.reshape(weight.shape), magnitude)
    if magnitude.dim() == 1:
        if layer.bias is not None:
            correction = (1 - scale) * layer.bias.float()
            shift = correction if shift is None else shift + correction
        scaled = replace(pair, B=pair.B * _along(scale, 0, pair.B.dim()))
        return LayerChange(scaled, gain=scale - 1, shift=shift)
    scaled = replace(pair, A=pair.A * _along(scale, 1, pair.A.dim()))
    inputs = _along(scale - 1, 0, weight.dim() - 1).to(weight.dtype)
    return LayerChange(scaled, shift=shift, difference=Difference(weight, inputs=inputs))


def _scale(total: Tensor, magnitude: Tensor) -> Tensor:
    """magnitude / norm: [o] for magnitudes [o], [i] for [1,i]. A row of zeros has no direction and stays."""
    rows = total if magnitude.dim() == 1 else total.transpose(0, 1)
    norms = rows.flatten(1).norm(dim=1)
    return torch.where(norms > 0, magnitude.flatten() / norms, 0.0)


def _along(vector: Tensor, axis: int, dims: int) -> Tensor:
    """[1,...,n,...,1] with n at `axis` of `dims`."""
    return vector.reshape([-1 if dim == axis else 1 for dim in range(dims)])
