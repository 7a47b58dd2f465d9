"""Linear and convolution layers whose rows may each carry another low-rank change.

Shapes: b rows, n tokens, i features in, o features out, R packed ranks. With `A` [R,i] and `B` [o,R] the
change of a layer is y + B A x (LoRA, arXiv 2106.09685); B is held transposed, so that the ranks of several
adapters lie side by side on one axis and a composition is one adapter of a larger rank.

A bank layer *is* the layer that it replaces: a subclass of nn.Linear or nn.Conv2d that holds the very same
Parameter objects under the same names. `state_dict`, `named_modules`, `save_pretrained` and `weight.dtype` of
a wrapped model are those of the unwrapped one; nothing of the bank is a parameter or buffer of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier_server.adapters.canonical import LoraModule


class Delta(Protocol):
    """What is added to the outputs of one layer during a forward."""

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        """x [b,...,i], base output y [b,...,o] -> [b,...,o]."""
        ...

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        """x [b,C,H,W], base output y [b,o,H',W'] -> [b,o,H',W']."""
        ...


class NormDelta(Protocol):
    """What is added to the outputs of one norm during a forward."""

    def norm(self, x: Tensor, y: Tensor, layer: BankNorm) -> Tensor:
        """x [b,...], base output y of its shape -> the same shape."""
        ...


AnyDelta = TypeVar("AnyDelta", Delta, NormDelta)


@dataclass(slots=True)
class Place(Generic[AnyDelta]):
    """Where a layer finds its delta of now.

    An object of its own, not looked up by the layer's name: compiled code is shared by all layers that are
    alike, and so must not know which of them it is.
    """

    delta: AnyDelta | None = None


class Current:
    """The deltas of the forward that runs now; shared by all layers of a bank.

    `words`: by text encoder the vectors [n,d] of the learned tokens of the text that is encoded now.

    Plain attributes and no context variables: with gradient checkpointing on CUDA the forward is computed
    again in autograd's own thread, which must see the same deltas.
    """

    def __init__(self) -> None:
        self.deltas: Mapping[str, Delta] = {}
        self.norms: Mapping[str, NormDelta] = {}
        self.words: Mapping[str, Tensor] = {}
        self._layers: dict[str, Place[Delta]] = {}
        self._norms: dict[str, Place[NormDelta]] = {}

    def layer_place(self, name: str) -> Place[Delta]:
        return self._layers.setdefault(name, Place())

    def norm_place(self, name: str) -> Place[NormDelta]:
        return self._norms.setdefault(name, Place())

    def activate(self, deltas: Mapping[str, Delta], norms: Mapping[str, NormDelta]) -> None:
        """Puts these, by layer name, into their places and nothing into the others."""
        _replace(self._layers, self.deltas, deltas)
        _replace(self._norms, self.norms, norms)
        self.deltas, self.norms = deltas, norms


def _replace(
    places: Mapping[str, Place[AnyDelta]], old: Mapping[str, AnyDelta], new: Mapping[str, AnyDelta]
) -> None:
    for name in old:
        places[name].delta = None
    for name, delta in new.items():
        places[name].delta = delta


@dataclass(frozen=True, slots=True)
class RowDelta:
    """Gathered slots, one stack of ranks a row: a [b,R,i] or [b*R,C,kh,kw], bt [b,R,o] with scales inside."""

    a: Tensor
    bt: Tensor

    def linear(self, x: Tensor, y: Tensor) -> Tensor:
        rows = checked_rows(x, self.bt.shape[0])
        inputs, outputs = x.reshape(rows, -1, x.shape[-1]), y.reshape(rows, -1, y.shape[-1])
        tokens = inputs.shape[1]
        if tokens == 1:
            # The product of a single vector is another kernel, whose last bits depend on how many zeros pad
            # the ranks, and so on the neighbours; the product of two is not.
            inputs, outputs = inputs.repeat(1, 2, 1), outputs.repeat(1, 2, 1)
        hidden = torch.bmm(inputs, self.a.transpose(1, 2))
        # In place: y is the base layer's fresh output, and reshape copies where it cannot view.
        return outputs.baddbmm_(hidden, self.bt)[:, :tokens].reshape(y.shape)

    def conv(self, x: Tensor, y: Tensor, layer: nn.Conv2d) -> Tensor:
        rows = checked_rows(x, self.bt.shape[0])
        hidden = _row_conv(x, self.a, layer, rows)
        return y.reshape(rows, y.shape[1], -1).baddbmm_(self.bt.transpose(1, 2), hidden).reshape(y.shape)


class BankLinear(nn.Linear):
    """`base` with deltas: shares its parameters. x [b,...,i] with b the rows of the current deltas."""

    def __init__(self, base: nn.Linear, name: str, current: Current) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.train(base.training)
        self.layer_name = name
        self.place = current.layer_place(name)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        delta = self.place.delta
        return y if delta is None else delta.linear(x, y)


class BankConv2d(nn.Conv2d):
    """`base` with deltas: shares its parameters. groups == 1 and zero padding only. x [b,C,H,W]."""

    def __init__(self, base: nn.Conv2d, name: str, current: Current) -> None:
        super().__init__(
            base.in_channels,
            base.out_channels,
            base.kernel_size,  # type: ignore[arg-type]  # torch types its own attribute wider than its argument
            base.stride,  # type: ignore[arg-type]
            base.padding,  # type: ignore[arg-type]
            base.dilation,  # type: ignore[arg-type]
            bias=base.bias is not None,
            device="meta",
        )
        self.weight = base.weight
        self.bias = base.bias
        self.train(base.training)
        self.layer_name = name
        self.place = current.layer_place(name)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        delta = self.place.delta
        return y if delta is None else delta.conv(x, y, self)


class BankGroupNorm(nn.GroupNorm):
    """`base`, which is affine, with deltas: shares its parameters."""

    def __init__(self, base: nn.GroupNorm, name: str, current: Current) -> None:
        super().__init__(base.num_groups, base.num_channels, base.eps, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.train(base.training)
        self.layer_name = name
        self.place = current.norm_place(name)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        delta = self.place.delta
        return y if delta is None else delta.norm(x, y, self)


class BankLayerNorm(nn.LayerNorm):
    """`base`, which is affine, with deltas: shares its parameters."""

    def __init__(self, base: nn.LayerNorm, name: str, current: Current) -> None:
        super().__init__(base.normalized_shape, base.eps, bias=base.bias is not None, device="meta")
        self.weight = base.weight
        self.bias = base.bias
        self.train(base.training)
        self.layer_name = name
        self.place = current.norm_place(name)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        delta = self.place.delta
        return y if delta is None else delta.norm(x, y, self)


BankLayer = BankLinear | BankConv2d
BankNorm = BankGroupNorm | BankLayerNorm


def wrapped(module: nn.Module, name: str, current: Current) -> BankLayer | None:
    """The bank layer for `module`, None where it is no plain linear or convolution layer."""
    # Exact types: a subclass may compute something else in its forward.
    if type(module) is nn.Linear:
        return BankLinear(module, name, current)
    if type(module) is nn.Conv2d and module.groups == 1 and module.padding_mode == "zeros":
        return BankConv2d(module, name, current)
    return None


def single_row(module: LoraModule, weight: Tensor) -> RowDelta:
    """The delta of a single row, of a layer with `weight`, that has `module` at weight 1."""
    a = module.A.to(weight).reshape(module.rank, *weight.shape[1:])
    b = (module.alpha / module.rank * module.B.float()).to(weight).reshape(-1, module.rank)
    return RowDelta(a if a.dim() == 4 else a[None], b.t()[None])


def is_norm(module: nn.Module) -> bool:
    """Whether `wrapped_norm` can take it: a plain norm with a weight."""
    return type(module) in (nn.GroupNorm, nn.LayerNorm) and module.weight is not None


def wrapped_norm(module: nn.Module, name: str, current: Current) -> BankNorm:
    """The bank layer for a norm."""
    if isinstance(module, nn.GroupNorm):
        return BankGroupNorm(module, name, current)
    assert isinstance(module, nn.LayerNorm)
    return BankLayerNorm(module, name, current)


def _row_conv(x: Tensor, a: Tensor, layer: nn.Conv2d, rows: int) -> Tensor:
    """Every row's own convolution, x [b,C,H,W] with a [b*R,C,kh,kw], as one grouped one -> [b,R,H'*W']."""
    if layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.padding == (0, 0):
        return torch.bmm(a.reshape(rows, -1, a.shape[1]), x.reshape(rows, x.shape[1], -1))
    packed = x.reshape(1, -1, *x.shape[2:])
    hidden = F.conv2d(packed, a, None, layer.stride, layer.padding, layer.dilation, groups=rows)
    return hidden.reshape(rows, a.shape[0] // rows, -1)


def checked_rows(x: Tensor, rows: int) -> int:
    """`rows`, if x has as many."""
    if x.shape[0] != rows:
        raise RuntimeError(f"a forward of {x.shape[0]} rows, but the bank was set for {rows}")
    return rows
