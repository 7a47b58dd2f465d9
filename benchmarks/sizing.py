"""`python -m benchmarks.sizing`: the table of docs/operations.md, from the layers' shapes alone.

Base: weights of 16 bits, as on a GPU. Slots: the tensors that the bank makes for every slot and the empty
one, for adapters of the U-Net's attention / of all its linear and convolution layers and of the text
encoders. A training: an adapter of rank TRAINED_RANK in float32 with its gradient and AdamW's two moments.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.layers import BankLayer
from atelier_server.adapters.slots import GroupKey, SlotGroup, group_key
from atelier_server.config import Settings
from atelier_server.training.methods.low_rank import ATTENTION

RANKS = (16, 64, 128)
TRAINED_RANK = 16
_STATE = 4 * torch.float32.itemsize  # weight, gradient, two moments
SD_VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class Family:
    """A published base: its U-Net, and its text encoders, as its configuration files describe them."""

    name: str
    unet: Callable[[], UNet2DConditionModel]
    encoders: Callable[[], tuple[nn.Module, ...]]


def _clip(width: int, layers: int, heads: int, activation: str, projection: int = 0) -> nn.Module:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        hidden_act=activation,
        projection_dim=projection or width,
    )
    model: nn.Module = CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)
    return model


FAMILIES = (
    Family(
        "Stable Diffusion 1.5",
        lambda: UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8),
        lambda: (_clip(768, 12, 12, "quick_gelu"),),
    ),
    Family(
        "Stable Diffusion 2.1",
        lambda: UNet2DConditionModel(
            sample_size=96,
            cross_attention_dim=1024,
            attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True,
        ),
        lambda: (_clip(1024, 23, 16, "gelu"),),
    ),
    Family(
        "SDXL 1.0",
        lambda: UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        lambda: (_clip(768, 12, 12, "quick_gelu"), _clip(1280, 32, 20, "gelu", projection=1280)),
    ),
)


def row(family: Family, slots: int) -> tuple[str, ...]:
    """Name, parameters, base, slots at each of RANKS (attention / all layers), one training."""
    with torch.device("meta"):
        unet, vae = family.unet(), AutoencoderKL(**SD_VAE)
        encoders = family.encoders()
    modules = [module.half() for module in (unet, vae, *encoders)]
    parameters = sum(p.numel() for module in modules for p in module.parameters())
    bank = SlotBank(slots=slots, max_rank=max(RANKS))
    for name, module in (("unet", unet), *zip(("text_encoder", "text_encoder_2"), encoders, strict=False)):
        bank.wrap(module, name)
    alike = defaultdict[GroupKey, list[BankLayer]](list)
    for layer in bank.layers.values():
        alike[group_key(layer)].append(layer)
    shapes = [
        layer.weight.shape
        for name, layer in bank.layers.items()
        if name.startswith("unet.") and name.endswith(ATTENTION)
    ]
    return (
        family.name,
        f"{parameters / 1e6:.0f} M",
        _gib(parameters * torch.float16.itemsize),
        *(_slots(alike, slots, rank) for rank in RANKS),
        _gib(sum(TRAINED_RANK * sum(shape) * _STATE for shape in shapes)),
    )


def _slots(alike: Mapping[GroupKey, Sequence[BankLayer]], slots: int, rank: int) -> str:
    """The tensors that the bank makes for `slots` and the empty slot 0, on the meta device."""
    sizes = {key: SlotGroup(layers, slots + 1, rank).size_bytes for key, layers in alike.items()}
    attention = sum(size for (_, attends, part), size in sizes.items() if attends and part == "unet")
    return f"{_gib(attention)} / {_gib(sum(sizes.values()))}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def table() -> str:
    """In Markdown, GiB; for the server's default number of slots."""
    slots = int(Settings.model_fields["slots"].default)
    head = (
        "base model",
        "parameters",
        "base",
        *(f"{slots} slots, rank {rank}" for rank in RANKS),
        "a training",
    )
    rows = [head, ("---",) * len(head), *(row(family, slots) for family in FAMILIES)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


if __name__ == "__main__":
    print(table())
