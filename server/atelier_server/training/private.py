"""A copy of a module of the base for one training: its own weights in float32, none of the bank's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor, nn


def outline(module: Any) -> Any:
    """The same architecture, in evaluation mode, without memory for weights: see `fill`."""
    cls = type(module)
    with torch.device("meta"):
        empty = cls.from_config(module.config) if isinstance(module, ModelMixin) else cls(module.config)
    return empty.eval()


def fill(empty: nn.Module, module: nn.Module, device: torch.device) -> dict[str, nn.Parameter]:
    """Gives an `outline` the weights of `module`, on `device`; its parameters, which learn.

    Buffers are copied as they are. Nothing of `module` is written or shared.
    """
    weights = {name: p.detach().to(device, torch.float32, copy=True) for name, p in module.named_parameters()}
    empty.load_state_dict(weights, strict=False, assign=True)
    for name, buffer in module.named_buffers():
        owner, _, last = name.rpartition(".")
        setattr(empty.get_submodule(owner), last, buffer.detach().to(device, copy=True))
    own: dict[str, nn.Parameter] = dict(empty.named_parameters())
    missing = [name for name, tensor in _tensors(empty).items() if tensor.is_meta]
    if missing or own.keys() != weights.keys():
        raise ValueError(f"{type(module).__name__} is not copied whole: {missing[:3]}")
    empty.requires_grad_()
    return own


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
