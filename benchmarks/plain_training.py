"""The peer of the training benchmarks: a subject learned as diffusers' train_dreambooth_lora.py does it.

    python -m benchmarks.plain_training BASE PICTURES FILE STEPS

One process with a pipeline, PEFT's LoRA on the U-Net's attention, AdamW and batches of one. In its best form:
captions and the VAE's posteriors are computed once, where the script encodes every picture at every step.
Prints the number of each step when it is done, and writes FILE at the end.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from benchmarks.bases import peer_pipeline

RANK = 16
LEARNING_RATE = 1e-4
RESOLUTION = 64
PROMPT = "a sks blue plush octopus"


def train(base: Path, pictures: list[Path], file: Path, steps: int) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pipeline = peer_pipeline(base)
    unet: Any = pipeline.unet
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(
        LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets)
    )
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=1e-2)
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    text, posteriors = _cached(pipeline, pictures)
    for step in range(steps):
        if step % len(posteriors) == 0:
            order = torch.randperm(len(posteriors)).tolist()
        latents = posteriors[order[step % len(posteriors)]].sample() * pipeline.vae.config.scaling_factor
        noise = torch.randn_like(latents)
        timesteps = torch.randint(noise_scheduler.config.num_train_timesteps, (1,))
        noisy = noise_scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, text, return_dict=False)[0]
        loss = F.mse_loss(prediction.float(), noise.float())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        print(step + 1, flush=True)
    StableDiffusionPipeline.save_lora_weights(
        file.parent,
        unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
        weight_name=file.name,
    )


@torch.no_grad()
def _cached(pipeline: Any, pictures: list[Path]) -> tuple[Tensor, list[Any]]:
    """The prompt as the U-Net hears it, and the VAE's posterior of each picture."""
    tokens = pipeline.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt")
    text = pipeline.text_encoder(tokens.input_ids)[0]
    posteriors = []
    for picture in pictures:
        with Image.open(picture) as file:
            small = file.convert("RGB").resize((RESOLUTION, RESOLUTION), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.asarray(small, dtype=np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
        posteriors.append(pipeline.vae.encode(pixels).latent_dist)
    return text, posteriors


if __name__ == "__main__":
    train(
        Path(sys.argv[1]), sorted(Path(sys.argv[2]).glob("*.png")), Path(sys.argv[3]), steps=int(sys.argv[4])
    )
