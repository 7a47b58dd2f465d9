"""A tiny U-Net with every kind of layer that Stable Diffusion 1.x has, and adapters for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
EVERYTHING = (
    *ATTENTION,
    ".ff.net.2",
    ".proj_in",
    ".conv1",
    ".conv_in",
    ".time_emb_proj",
    ".linear_1",
    ".conv",
)
BATCH = 8


def tiny_unet(seed: int = 0) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    return unet.eval().requires_grad_(False)


def wrapped_unet(slots: int = 6, max_rank: int = 40, seed: int = 0) -> tuple[UNet2DConditionModel, SlotBank]:
    unet = tiny_unet(seed)
    bank = SlotBank(slots=slots, max_rank=max_rank)
    bank.wrap(unet, "unet")
    return unet, bank


def adapter_for(
    bank: SlotBank,
    *,
    rank: int,
    alpha: float,
    seed: int,
    targets: Sequence[str] = ATTENTION,
    size: float = 0.1,
) -> CanonicalAdapter:
    """Random weights for the layers whose names end so."""
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for name, layer in bank.layers.items():
        if name.endswith(tuple(targets)):
            out, *features = layer.weight.shape
            b_shape = (out, rank, 1, 1) if isinstance(layer, nn.Conv2d) else (out, rank)
            modules[name] = LoraModule(
                torch.randn(rank, *features, generator=generator) * size,
                torch.randn(b_shape, generator=generator) * size,
                alpha,
            )
    return CanonicalAdapter(modules)


def merged_unet(parts: Sequence[tuple[CanonicalAdapter, float]], seed: int = 0) -> UNet2DConditionModel:
    """The reference: W + weight * alpha/r * B A, written into a fresh copy of the base."""
    unet = tiny_unet(seed)
    for adapter, weight in parts:
        for name, module in adapter.low_rank.items():
            target = unet.get_submodule(name.removeprefix("unet.")).weight
            rank = module.A.shape[0]
            delta = module.B.reshape(-1, rank) @ module.A.reshape(rank, -1)
            target.data += weight * module.alpha / rank * delta.reshape(target.shape)
    return unet


class Inputs:
    """Rows of latents, timesteps and prompts."""

    def __init__(self, rows: int = BATCH, seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.latents = torch.randn(rows, 4, 8, 8, generator=generator)
        self.timesteps = torch.randint(0, 1000, (rows,), generator=generator).float()
        self.prompts = torch.randn(rows, 5, 24, generator=generator)

    @torch.no_grad()
    def run(self, unet: UNet2DConditionModel, row: int | None = None) -> Tensor:
        picked = slice(None) if row is None else slice(row, row + 1)
        output: Tensor = unet(self.latents[picked], self.timesteps[picked], self.prompts[picked]).sample
        return output
