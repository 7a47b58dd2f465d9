"""Weights in eight bits, by torchao: less memory, for somewhat other pictures.

torchao is an extra that is imported here alone, and only when a server is told to quantise: its import takes
seconds, and diffusers tells about it.
"""

from __future__ import annotations

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atelier_server.diffusion.families import UnsupportedModel

Quantization = Literal["", "int8", "fp8"]

# Weights alone: activations stay as they are, so that a row's bits do not depend on its neighbours' values.
_CONFIGS = {"int8": "Int8WeightOnlyConfig", "fp8": "Float8WeightOnlyConfig"}


def quantize(module: nn.Module, kind: Quantization, device: torch.device) -> None:
    """Moves `module` to the device and keeps its linear layers' weights in eight bits there, in place.

    One layer at a time: the device never holds them all at full size. They go on telling the dtype that they
    had, and `dequantize` gives a matrix of it. Raises UnsupportedModel without torchao.
    """
    try:
        torchao: Any = importlib.import_module("torchao.quantization")
    except ImportError as error:
        raise UnsupportedModel(
            f"--quantize {kind} needs torchao ({error}): pip install 'atelier[quantize]'"
        ) from error
    torchao.quantize_(module, getattr(torchao, _CONFIGS[kind])(), device=device)


def stored_bytes(tensor: Tensor) -> int:
    """What a weight takes; of a quantised one its integers and scales."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.nbytes
    names, _ = tensor.__tensor_flatten__()
    return sum(getattr(tensor, name).nbytes for name in names)
