"""Small bases with random weights, saved as diffusers folders, and random adapters for them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from atelier_server import pocket
from atelier_server.adapters.canonical import CanonicalAdapter, LoraModule
from atelier_server.adapters.exporter import write_adapter

PROMPTS = ("a red cat", "a blue octopus on a beach", "a car", "a fish at night")


def sd1_shaped(folder: Path) -> Path:
    """Stable Diffusion 1.5's layer graph (16 transformer blocks, 128 attention projections), widths / 10.

    Latents 8 x 8. What a step costs is then dispatch, as it is on a GPU that is not full.
    """
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(pocket.path() / "tokenizer")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64, 128, 128),
        layers_per_block=2,
        cross_attention_dim=64,
        attention_head_dim=4,
        norm_num_groups=32,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return folder


def peer_pipeline(folder: Path) -> StableDiffusionPipeline:
    """diffusers' own pipeline on the same base."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def random_adapters(folder: Path, base: Path, *, count: int, rank: int) -> list[Path]:
    """LoRA files in diffusers' layout on every attention projection of the U-Net."""
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number in range(count):
        paths.append(folder / f"subject{number}.safetensors")
        write_adapter(random_adapter(unet, number, rank=rank), paths[-1])
    return paths


def random_adapter(
    unet: torch.nn.Module,
    seed: int,
    *,
    rank: int,
    dtype: torch.dtype = torch.float32,
    size: float = 0.02,
) -> CanonicalAdapter:
    """On every attention projection; only the shapes of `unet` count. On the CPU."""
    generator = torch.Generator().manual_seed(seed)
    return CanonicalAdapter(
        {
            f"unet.{name}": LoraModule(
                (torch.randn(rank, module.in_features, generator=generator) / rank).to(dtype),
                (torch.randn(module.out_features, rank, generator=generator) * size).to(dtype),
                float(rank),
            )
            for name, module in unet.named_modules()
            if isinstance(module, torch.nn.Linear) and ".attn" in name
        }
    )
