"""The third part: a U-Net that denoises latents by a prompt.

Phase 1 leaves the text encoder as it is; in phase 2 it learns along at half the rate, which is what made
subjects appear. v-prediction (arXiv 2202.00512), min-SNR weights (arXiv 2303.09556), captions left out now
and then for classifier-free guidance (arXiv 2207.12598).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pocket.captions import Attributes, describe
from pocket.data import PictureSet
from pocket.text import token_ids
from pocket.training import Batch, Losses, autocast, device
from pocket.vae import latents_of

CHANNELS = (48, 96, 160)
_DROPPED = 0.1
_SNR_GAMMA = 5.0


def build_unet(text_width: int, channels: tuple[int, ...] = CHANNELS, size: int = 16) -> UNet2DConditionModel:
    """Stable Diffusion's U-Net, narrow: one layer a block, attention on all but the finest level."""
    below = len(channels) - 1
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * below),
        up_block_types=(*("CrossAttnUpBlock2D",) * below, "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        cross_attention_dim=text_width,
        # diffusers' name for the number of heads.
        attention_head_dim=tuple(max(1, width // 32) for width in channels),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule with v-prediction."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the U-Net learns from: scaled latents, half precision [n, 4, h, w], and what each shows."""

    latents: Tensor
    attributes: tuple[Attributes, ...]
    tokenizer: CLIPTokenizer


def lesson(pictures: PictureSet, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Lesson:
    """Encodes the pictures; they are put in other words each time one is chosen."""
    latents = latents_of(vae, pictures.pixels) * vae.config.scaling_factor
    return Lesson(latents, pictures.attributes, tokenizer)


class UnetTask:
    """Noise at a random time, predicted away.

    Faces are drawn twice as often as the rest: an expression is a few pixels of a latent.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        taught: Lesson,
        *,
        text_rate: float = 0.5,
        batch_size: int = 32,
    ) -> None:
        """`text_rate`: the text encoder's share of the learning rate; 0 is phase 1."""
        self._unet = unet.to(device(), memory_format=torch.channels_last)
        self._text = text_encoder.to(device())
        if device().type == "cpu":
            # With heads this small, plain matrix products train a fifth faster than the fused kernel.
            unet.set_attn_processor(AttnProcessor())
        self.network: nn.Module = nn.ModuleDict({"unet": self._unet, "text_encoder": self._text})
        self._lesson, self._text_rate, self._batch_size = taught, text_rate, batch_size
        faces = [number for number, shown in enumerate(taught.attributes) if shown.expression is not None]
        self._often = torch.tensor([*range(len(taught.attributes)), *faces])
        self._text.requires_grad_(text_rate > 0)
        self._noising = DDPMScheduler.from_config(build_scheduler().config)
        snr = self._noising.alphas_cumprod / (1 - self._noising.alphas_cumprod)
        self._weights = (snr.clamp(max=_SNR_GAMMA) / (snr + 1)).to(device())
        self._noising.alphas_cumprod = self._noising.alphas_cumprod.to(device())

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(1.0, list(self._unet.parameters())), (self._text_rate, list(self._text.parameters()))]

    def batch(self, generator: torch.Generator) -> Batch:
        """ "latents" [b, 4, h, w], "ids" [b, tokens] of their captions and "times" [b]."""
        taught, count = self._lesson, self._batch_size
        chosen = self._often[torch.randint(len(self._often), (count,), generator=generator)]
        dropped = torch.rand(count, generator=generator) < _DROPPED
        rng = np.random.default_rng(int(torch.randint(2**31, (), generator=generator)))
        captions = [
            "" if left_out else describe(taught.attributes[number], rng)
            for number, left_out in zip(chosen.tolist(), dropped.tolist(), strict=True)
        ]
        times = torch.randint(self._noising.config.num_train_timesteps, (count,), generator=generator)
        ids = token_ids(taught.tokenizer, captions)
        return {"latents": taught.latents[chosen], "ids": ids, "times": times}

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        latents, times = batch["latents"].float(), batch["times"]
        noise = torch.randn(latents.shape, generator=generator, device=device())
        noisy = self._noising.add_noise(latents, noise, times)
        target = self._noising.get_velocity(latents, noise, times)
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        with autocast():
            with torch.set_grad_enabled(self._text_rate > 0):
                hidden = self._text(batch["ids"])[0]
            velocity = self._unet(noisy, times, encoder_hidden_states=hidden).sample.float()
        errors = ((velocity - target) ** 2).mean((1, 2, 3))
        return {"loss": (errors * self._weights[times]).mean(), "v_mse": errors.mean()}


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The U-Net of a pipeline's folder, in float32."""
    return UNet2DConditionModel.from_pretrained(folder / "unet", dtype=torch.float32)
