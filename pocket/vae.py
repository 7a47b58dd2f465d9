"""The first part: a VAE that turns 64 x 64 pixels into 4 x 16 x 16 latents and back.

Its gate is 30 dB on pictures it has not seen.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.data import Pixels
from pocket.training import Batch, Losses, autocast, device

GATE_DB = 30.0
CHANNELS = (24, 48, 96)
_GROUP = 4  # channels a normalisation group has at the first level
_CROP = 32


def build_vae(channels: tuple[int, ...] = CHANNELS, size: int = 64) -> AutoencoderKL:
    """A narrow VAE that begins near the identity: residuals near zero, down averages, up copies."""
    levels = len(channels)
    vae = AutoencoderKL(
        sample_size=size,
        latent_channels=4,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=channels[0] // _GROUP,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, ResnetBlock2D):
                module.conv2.weight.mul_(0.05)
                module.conv2.bias.zero_()
            elif isinstance(module, Attention):
                module.to_out[0].weight.mul_(0.05)
            elif isinstance(module, Downsample2D | Upsample2D):
                _begin_resampling(module)
    return vae


def _begin_resampling(module: nn.Module) -> None:
    convolution = module.conv
    assert isinstance(convolution, nn.Conv2d)
    assert convolution.bias is not None
    convolution.weight.mul_(0.05)
    convolution.bias.zero_()
    for channel in range(min(convolution.weight.shape[:2])):
        if isinstance(module, Downsample2D):
            convolution.weight[channel, channel, :2, :2] += 0.25
        else:
            convolution.weight[channel, channel, 1, 1] += 1.0


def widened(vae: AutoencoderKL, channels: tuple[int, ...] = CHANNELS) -> AutoencoderKL:
    """A wider VAE that computes what `vae` computes, with room to learn more.

    Every width grows by the same factor, and so does the number of groups, so that the first groups of each
    normalisation hold the old channels. Old channels do not listen to new ones yet.
    """
    wide = build_vae(channels, vae.config.sample_size)
    old = vae.state_dict()
    with torch.no_grad():
        for name, weight in wide.state_dict().items():
            kept = old[name]
            region = tuple(slice(0, length) for length in kept.shape)
            if kept.dim() > 1:
                weight[: kept.shape[0]].zero_()
            weight[region] = kept
        for name, module in wide.named_modules():
            if isinstance(module, Attention):
                # Scores are divided by the root of the width, which has grown.
                factor = math.sqrt(module.to_q.in_features / old[f"{name}.to_q.weight"].shape[1])
                module.to_q.weight.mul_(factor)
                module.to_q.bias.mul_(factor)
                # What a new channel asks for must find nothing at first.
                module.to_k.weight[len(old[f"{name}.to_k.weight"]) :].zero_()
                module.to_k.bias[len(old[f"{name}.to_k.weight"]) :].zero_()
    wide.register_to_config(scaling_factor=vae.config.scaling_factor)
    return wide


class VaeTask:
    """Crops of pictures at several scales, back from their latents."""

    def __init__(
        self,
        vae: AutoencoderKL,
        pixels: Pixels,
        *,
        encoder_rate: float = 1.0,
        batch_size: int = 16,
        kl_weight: float = 2e-4,
    ) -> None:
        """`pixels`: uint8 [n, s, s, 3], s at least the VAE's own size; `encoder_rate`: the encoder's share of
        the learning rate, 0 to leave it (and so the latents) as it is."""
        self.network: nn.Module = vae
        self._vae, self._encoder_rate = vae.to(device()), encoder_rate
        self._shown = {side: _shrunk(pixels, side) for side in (64, 40)}
        self._batch_size, self._kl_weight = batch_size, kl_weight
        vae.to(memory_format=torch.channels_last)
        for half in (vae.encoder, vae.quant_conv):
            half.requires_grad_(encoder_rate > 0)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        vae = self._vae
        encoder = [*vae.encoder.parameters(), *vae.quant_conv.parameters()]
        decoder = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
        return [(self._encoder_rate, encoder), (1.0, decoder)]

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        pixels = as_floats(batch["pixels"]).contiguous(memory_format=torch.channels_last)
        with autocast():
            posterior = self._vae.encode(pixels).latent_dist
            # A U-Net never hits a latent exactly; the decoder learns to forgive.
            noise = torch.randn(posterior.mean.shape, generator=generator, device=device())
            spread = posterior.std if self._encoder_rate else 0.0
            back = self._vae.decode(posterior.mean + noise * (spread + 0.03)).sample.float()
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        edges = sum((a - b).abs().mean() for a, b in zip(_slopes(back), _slopes(pixels), strict=True))
        squared = F.mse_loss(back, pixels)
        # Mostly the square, which is what decibels measure; the rest keeps edges from washing out.
        loss = 0.5 * F.l1_loss(back, pixels) + 8 * squared + 0.15 * edges + self._kl_weight * kl
        return {"loss": loss, "mse": squared, "kl": kl}

    def batch(self, generator: torch.Generator) -> Batch:
        """Bytes [b, 32, 32, 3] as "pixels", from pictures shown at 64 pixels or, for finer marks, at 40;
        sometimes mirrored, sometimes with the colour channels exchanged."""
        side = 40 if torch.rand((), generator=generator) < 0.25 else 64
        whole = self._shown[side]
        chosen = torch.randint(len(whole), (self._batch_size,), generator=generator)
        row, column = (torch.randint(side - _CROP + 1, (2,), generator=generator) // 4 * 4).tolist()
        crops = whole[chosen, row : row + _CROP, column : column + _CROP]
        if torch.rand((), generator=generator) < 0.5:
            crops = crops.flip(2)
        if torch.rand((), generator=generator) < 0.25:
            crops = crops[..., torch.randperm(3, generator=generator)]
        return {"pixels": crops}


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """Pictures [n, 3, h, w] in -1..1 after a way through the latents, clamped, on the CPU."""
    blocks = [block.to(vae.device) for block in torch.split(pixels, batch_size)]
    parts = [vae.decode(vae.encode(block).latent_dist.mean).sample.cpu() for block in blocks]
    return torch.cat(parts).clamp(-1, 1)


def decibels(pixels: Tensor, back: Tensor) -> float:
    """Mean peak signal-to-noise ratio of pictures in -1..1, in dB."""
    error = ((pixels - back) ** 2).mean((1, 2, 3)).clamp_min(1e-10) / 4
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Pixels) -> Tensor:
    """Unscaled posterior means of uint8 [n, h, w, 3]: float16 [n, 4, h/4, w/4], on the CPU."""
    vae.to(device()).eval()
    batch_size = 64 if device().type == "cpu" else 1024
    means = []
    for start in range(0, len(pixels), batch_size):
        block = as_tensor(pixels[start : start + batch_size], device())
        with autocast():
            mean = vae.encode(block.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        means.append(mean.half().cpu())
    return torch.cat(means)


def as_tensor(pixels: Pixels, on: torch.device | None = None) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 3, h, w] in -1..1."""
    return as_floats(torch.from_numpy(pixels.copy()).to(on))


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 3, h, w] in -1..1."""
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1


def moved(pixels: Pixels, generator: torch.Generator, reach: int = 4) -> Tensor:
    """Pictures [n, h, w, 3], half the time mirrored, and moved by up to `reach` pixels around their edges."""
    shown = torch.from_numpy(pixels)
    if torch.rand((), generator=generator) < 0.5:
        shown = shown.flip(2)
    down, right = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    return shown.roll((down, right), (1, 2))


def set_scaling_factor(vae: AutoencoderKL, pixels: Pixels) -> None:
    """Makes scaled latents of these pictures have a standard deviation of 1."""
    vae.register_to_config(scaling_factor=1 / float(latents_of(vae, pixels).float().std()))


def load_vae(folder: Path) -> AutoencoderKL:
    """The VAE of a pipeline's folder, in float32."""
    return AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32)


def _shrunk(pixels: Pixels, side: int) -> Tensor:
    """Bytes [n, s, s, 3], averaged down to [n, side, side, 3]."""
    if pixels.shape[1] == side:
        return torch.from_numpy(pixels.copy())
    blocks = [
        F.interpolate(torch.from_numpy(block.copy()).permute(0, 3, 1, 2).float(), (side, side), mode="area")
        for block in np.array_split(pixels, -(-len(pixels) // 256))
    ]
    return torch.cat([block.round().byte() for block in blocks]).permute(0, 2, 3, 1).contiguous()


def _slopes(pixels: Tensor) -> tuple[Tensor, Tensor]:
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., 1:] - pixels[..., :-1]
