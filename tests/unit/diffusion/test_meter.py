"""The meter: the peak of what is alive, and of nothing that was there before."""

from __future__ import annotations

import pytest
import torch

from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.diffusion.meter import peak_bytes

KIB = 256  # float32 values


def test_what_is_freed_makes_room() -> None:
    def work() -> None:
        for _ in range(5):
            torch.zeros(4 * KIB).add_(1)
        torch.cat([torch.zeros(KIB), torch.zeros(KIB)])

    assert peak_bytes(work) == 4096


def test_weights_and_their_views_count_for_nothing() -> None:
    layer, x = torch.nn.Linear(KIB, KIB), torch.zeros(1, KIB)
    with torch.no_grad():
        assert peak_bytes(lambda: layer(x)) == 1024


def test_results_that_are_kept_stay_alive() -> None:
    kept: list[torch.Tensor] = []
    assert peak_bytes(lambda: [kept.append(torch.zeros(KIB)) for _ in range(3)]) == 3 * 1024


def test_a_forward_grows_with_rows_and_pixels() -> None:
    """So what a forward of two rows at native size takes tells what any other takes."""
    base = load_base("pocket", "cpu", "float32")
    denoiser = Denoiser(base.unet, base.scheduler_config)

    def per_row_pixel(rows: int, side: int) -> float:
        prompt = base.family.condition(base.encode_prompt("a cat"), Framing.whole(side, side))
        latents = torch.zeros((rows, *base.latent_shape(side, side)))

        def forward() -> None:
            with torch.no_grad():
                denoiser.predict(latents, torch.zeros(rows), Conditioning.stack([prompt], rows))

        return peak_bytes(forward) / (rows * side * side)

    known = per_row_pixel(2, 64)
    assert [per_row_pixel(8, 64), per_row_pixel(2, 128)] == pytest.approx([known, known], rel=0.03)
