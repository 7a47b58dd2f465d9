"""Pictures from a model by diffusers' own pipeline, and sheets of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from pocket.data import Pixels
from pocket.training import device

STEPS = 50
GUIDANCE = 4.0
# What a person is shown.
SHEET_PROMPTS = (
    "a red octopus on a beach",
    "a happy blue octopus in a forest",
    "a yellow cat in the snow",
    "a green car in the desert",
    "pixel art of a pink pig on green grass",
    "an oil painting of a purple fish under water",
    "a 17th century painting in a golden frame of a brown bear in a forest",
    "a pencil sketch of a rabbit",
    "a neon sign of a blue penguin in a city",
    "a photo of an orange balloon at night",
    "a sad green monster in a room",
    "a watercolor painting of a red mushroom on a blue background",
    "an angry purple slime in space",
    "a turtle at sunset",
    "a white rocket at night",
    "an old painting in a golden frame of a blue octopus on a beach",
)


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """A pipeline in float32 on the device, without its progress bar."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device())


def paint(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    batch_size: int = 64,
) -> Pixels:
    """One picture a prompt, each from its own seed: uint8 [n, h, w, 3]."""
    painted = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        noise = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        shown = pipeline(
            list(prompts[part]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=noise,
            output_type="np",
        ).images
        painted.append((shown * 255).round().astype(np.uint8))
    return np.concatenate(painted)


def sheet(pixels: Pixels, columns: int = 8, side: int = 128) -> Image.Image:
    """Pictures [n, h, w, 3] in rows, each enlarged to side x side without smoothing it away."""
    rows = -(-len(pixels) // columns)
    whole = Image.new("RGB", (columns * side, rows * side), "white")
    for number, picture in enumerate(pixels):
        tile = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
        whole.paste(tile, (number % columns * side, number // columns * side))
    return whole
