"""The embedded model's folder: complete, clean, small, and it paints."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

import atelier_server.pocket
from pocket.data import SetRecipe, draw_block
from pocket.vae import as_tensor, decibels, load_vae, reconstructed

FOLDER = atelier_server.pocket.path()


@pytest.mark.parametrize("path", [p.relative_to(FOLDER).as_posix() for p in sorted(FOLDER.rglob("*.json"))])
def test_no_file_tells_where_it_was_made(path: str) -> None:
    entries = json.loads((FOLDER / path).read_text(encoding="utf-8"))
    assert not {"_name_or_path", "name_or_path", "is_local", "local_files_only"} & set(entries)


def test_weights_are_half_precision_and_small() -> None:
    weights = sorted(FOLDER.rglob("*.safetensors"))
    assert [path.parent.name for path in weights] == ["scorer", "text_encoder", "unet", "vae"]
    for path in weights:
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} <= {torch.float16, torch.int64}  # noqa: SIM118
    assert sum(path.stat().st_size for path in FOLDER.rglob("*")) < 40e6


def test_its_autoencoder_gives_unseen_pictures_back() -> None:
    pixels, _, _ = draw_block(SetRecipe("small", 777, 192), 0, 192)
    shown = as_tensor(pixels)
    # The gate, 30 dB, is measured on 1,024 pictures; neon signs, the hardest, come by lot.
    assert decibels(shown, reconstructed(load_vae(FOLDER), shown)) > 29.8


def test_it_paints_what_is_asked_and_the_same_again() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER)
    pipeline.set_progress_bar_config(disable=True)

    def paint(prompt: str) -> np.ndarray:
        noise = torch.Generator().manual_seed(1)
        [image] = pipeline(
            prompt, num_inference_steps=6, guidance_scale=4.0, width=64, height=64, generator=noise
        ).images
        return np.asarray(image, np.float32)

    red, blue = paint("a red octopus on a beach"), paint("a blue octopus on a beach")
    assert red.shape == (64, 64, 3)
    assert np.array_equal(red, paint("a red octopus on a beach"))
    middle = (slice(20, 52), slice(16, 48))
    assert red[middle][..., 0].mean() > blue[middle][..., 0].mean() + 20
    assert blue[middle][..., 2].mean() > red[middle][..., 2].mean() + 20
