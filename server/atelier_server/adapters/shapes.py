"""Whether a module of an adapter fits a layer of the base, by shapes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from atelier_server.adapters.canonical import DenseModule, LoraModule, Module


def shape_fault(module: Module, shape: Sequence[int], max_rank: int) -> str:
    """What is wrong with `module` for a layer whose weight has `shape`, "" if nothing.

    A linear layer may come as a 1x1 convolution. Norms, whose shape is [o], take differences only.
    """
    if len(shape) == 1 and (isinstance(module, LoraModule) or module.magnitude is not None):
        return "changes a norm by more than a difference"
    if isinstance(module, LoraModule):
        fault = _pair_fault(module, shape, max_rank)
    else:
        fault = _difference_fault(module, shape)
    if fault:
        return fault
    if module.bias is not None and tuple(module.bias.shape) != (shape[0],):
        return f"has a bias of shape {tuple(module.bias.shape)}; ({shape[0]},) would fit"
    if module.magnitude is not None and tuple(module.magnitude.shape) not in {(shape[0],), (1, shape[1])}:
        return f"has magnitudes of shape {tuple(module.magnitude.shape)}; ({shape[0]},) would fit"
    return ""


def shaped(module: Module, shape: Sequence[int]) -> Module:
    """A module that fits, with the layer's own dimensions: a linear one's may come as a 1x1 convolution's."""
    if not isinstance(module, LoraModule):
        return module
    ones = (1,) * len(shape[2:])
    A, B = module.A.reshape(module.rank, *shape[1:]), module.B.reshape(*module.B.shape[:2], *ones)
    return replace(module, A=A, B=B)


def same_shape(one: Sequence[int], other: Sequence[int]) -> bool:
    """But for ones at the end."""
    return _trimmed(one) == _trimmed(other)


def _pair_fault(module: LoraModule, shape: Sequence[int], max_rank: int) -> str:
    rank = module.A.shape[0]
    out, *features = shape
    if 1 <= rank <= max_rank and module.A.shape == (rank, *features) and module.B.shape == (out, rank):
        return ""
    if not 1 <= rank <= max_rank:
        return f"has rank {rank}; this server takes 1 to {max_rank}"
    if _trimmed(module.A.shape[1:]) != _trimmed(features):
        return f"takes inputs of shape {tuple(module.A.shape[1:])}, the base model's of {tuple(features)}"
    if _trimmed(module.B.shape) != _trimmed((out, rank)):
        return f"has B of shape {tuple(module.B.shape)}; ({out}, {rank}) would fit"
    return ""


def _difference_fault(module: DenseModule, shape: Sequence[int]) -> str:
    if module.weight is None:
        return "" if module.bias is not None and module.magnitude is None else "changes nothing"
    if _trimmed(module.weight.shape) != _trimmed(shape):
        return f"has a difference of shape {tuple(module.weight.shape)}, the base model's is {tuple(shape)}"
    return ""


def _trimmed(shape: Sequence[int]) -> tuple[int, ...]:
    """Without the ones at the end."""
    kept = len(shape)
    while kept and shape[kept - 1] == 1:
        kept -= 1
    return tuple(shape[:kept])
