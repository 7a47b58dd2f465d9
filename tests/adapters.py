"""Random adapters for `pocket`, as files, and the same change merged into weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline

from atelier_server import pocket
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.exporter import Layout, write_adapter


def random_adapter(seed: int, *, rank: int, alpha: float, convolutions: bool = False) -> CanonicalAdapter:
    """A visible change of the U-Net's attention, of its convolutions too if asked."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, module in _unet().named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) * 0.1
        elif convolutions and isinstance(module, torch.nn.Conv2d) and ".resnets." in name:
            shape = (rank, module.in_channels, *module.kernel_size)
            a = torch.randn(shape, generator=generator) / (module.in_channels * 9) ** 0.5
            b = torch.randn(module.out_channels, rank, 1, 1, generator=generator) * 0.02
        else:
            continue
        modules[f"unet.{name}"] = LoraModule(a, b, alpha)
    return CanonicalAdapter(modules)


@cache
def _unet() -> torch.nn.Module:
    """Of pocket, for its names and shapes."""
    unet: torch.nn.Module = StableDiffusionPipeline.from_pretrained(pocket.path(), dtype=torch.float32).unet
    return unet


def weights() -> dict[str, torch.Tensor]:
    """Of pocket's U-Net, by layer."""
    return {
        f"unet.{name}": module.weight.detach()
        for name, module in _unet().named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }


def write(adapter: CanonicalAdapter, path: Path, layout: Layout = "diffusers") -> Path:
    write_adapter(adapter, path, layout)
    return path


def merge(pipeline: StableDiffusionPipeline, adapter: CanonicalAdapter, weight: float) -> None:
    """W + weight * alpha/r * B A into the U-Net's weights."""
    for name, module in adapter.low_rank.items():
        target = pipeline.unet.get_submodule(name.removeprefix("unet.")).weight
        delta = module.B.flatten(1) @ module.A.flatten(1)
        with torch.no_grad():
            target += (weight * module.alpha / module.A.shape[0] * delta).reshape(target.shape)
