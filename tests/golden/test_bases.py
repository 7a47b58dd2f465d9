"""The tests' own bases: real folders, the same bits every time, and pictures that hear their prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.bases import FAMILIES, PIXELS, peer, save_base


@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_is_whole_and_hears_its_prompt(family: str, tmp_path: Path) -> None:
    pipeline = peer(family, save_base(family, tmp_path / "base"))

    def paint(prompt: str) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt, num_inference_steps=3, generator=generator, output_type="np").images[0]

    red, blue = paint("a red cat"), paint("a blue fish on a beach")
    assert red.shape == (PIXELS, PIXELS, 3)
    assert red.std() > 0.05
    assert np.abs(red - blue).max() > 10 / 255


def test_a_base_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = (
        load_file(save_base("sdxl", tmp_path / name) / "unet" / "diffusion_pytorch_model.safetensors")
        for name in ("first", "second")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
