"""Published bases at their real widths with random weights, made on the device and saved as folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTokenizer

from atelier_server import pocket
from benchmarks.sizing import FAMILIES, SD_VAE, Family

_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_TINY_ENCODER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
_TINY_VAE = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}


def dtype_on(device: str) -> torch.dtype:
    """What both sides compute in: bfloat16 on a GPU. A CPU is for smoke runs, where it would be slow."""
    return torch.bfloat16 if device == "cuda" else torch.float32


@dataclass(frozen=True)
class RealBase:
    """`scheduler` is the contract's name for what both sides use; `tiny_unet` makes its U-Net small.

    `target` is that of images/s against diffusers; `limit` the seconds a picture of 30 steps at 790 TFLOP/s.
    """

    name: str
    title: str
    published: Family
    pixels: int
    scheduler: str
    target: str
    limit: float
    tiny_unet: Mapping[str, Any] = field(default_factory=dict)

    @property
    def extended(self) -> bool:
        return self.scheduler == "euler"

    def save(self, folder: Path, device: str, *, tiny: bool) -> Path:
        """A diffusers folder; `tiny` keeps the layer graph alone."""
        torch.manual_seed(0)
        modules = self._modules(device, tiny=tiny)
        tokenizer = CLIPTokenizer.from_pretrained(pocket.path() / "tokenizer", model_max_length=77)
        if self.extended:
            scheduler: Any = EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading")
            pipeline: DiffusionPipeline = StableDiffusionXLPipeline(
                **modules,
                tokenizer=tokenizer,
                tokenizer_2=tokenizer,
                scheduler=scheduler,
                add_watermarker=False,
            )
        else:
            scheduler = DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False)
            pipeline = StableDiffusionPipeline(
                **modules,
                tokenizer=tokenizer,
                scheduler=scheduler,
                safety_checker=None,
                feature_extractor=None,
                requires_safety_checker=False,
            )
        pipeline.save_pretrained(folder)
        return folder

    def peer(self, folder: Path, device: str) -> DiffusionPipeline:
        """diffusers' own. Both sides decode in bfloat16: `force_upcast` is heeded in float16 alone."""
        extra = {} if self.extended else {"safety_checker": None, "requires_safety_checker": False}
        cls = StableDiffusionXLPipeline if self.extended else StableDiffusionPipeline
        pipeline = cls.from_pretrained(folder, dtype=dtype_on(device), **extra).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _modules(self, device: str, *, tiny: bool) -> dict[str, nn.Module]:
        with torch.device("meta"):
            unet, encoders = self.published.unet(), self.published.encoders()
        vae: dict[str, Any] = {
            **SD_VAE,
            "sample_size": self.pixels,
            "force_upcast": self.extended,
            "scaling_factor": 0.13025 if self.extended else 0.18215,
        }
        dtype = dtype_on(device)
        # Not what diffusers adds of its own, such as which values were defaults: it would set them again.
        changed = self.tiny_unet if tiny else {}
        settings = {k: v for k, v in unet.config.items() if not k.startswith("_")} | dict(changed)
        with torch.device(device):
            made: dict[str, nn.Module] = {
                "unet": UNet2DConditionModel(**settings).to(dtype),
                "vae": AutoencoderKL(**{**vae, **(_TINY_VAE if tiny else {})}).to(dtype),
            }
            for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=False):
                config: Any = encoder.config
                config.update(_TINY_ENCODER if tiny else {})
                made[name] = type(encoder)(config).to(dtype)
        return made


BASES = {
    base.name: base
    for base in (
        RealBase(
            name="sd15",
            title="SD 1.5, 512 px",
            published=FAMILIES[0],
            pixels=512,
            scheduler="ddim",
            target=">= 5",
            limit=0.064,
            tiny_unet={
                "block_out_channels": (32, 64, 128, 128),
                "cross_attention_dim": 32,
                "attention_head_dim": 4,
                "sample_size": 8,
            },
        ),
        RealBase(
            name="sdxl",
            title="SDXL, 1024 px",
            published=FAMILIES[2],
            pixels=1024,
            scheduler="euler",
            target=">= 1.8",
            limit=0.527,
            tiny_unet={
                "block_out_channels": (32, 64, 128),
                "cross_attention_dim": 64,
                "attention_head_dim": (2, 4, 8),
                "transformer_layers_per_block": (1, 1, 2),
                "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 32 + 6 * 8,
                "sample_size": 8,
            },
        ),
    )
}
