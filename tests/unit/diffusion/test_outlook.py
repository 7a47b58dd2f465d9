"""Previews: the clean latents against the schedulers' own, colours against the decoded picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from atelier_server.core import SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.outlook import LatentColours
from atelier_server.diffusion.trajectory import Trajectory


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("pocket", "cpu")


def begun(base: BaseModel, name: str, steps: int, options: SchedulerOptions) -> Picture:
    trajectory = Trajectory.begin(
        name,
        base.scheduler_config,
        options=options,
        num_inference_steps=steps,
        seed=3,
        shape=base.latent_shape(64, 64),
        device=base.device,
        dtype=base.dtype,
    )
    framing = Framing.whole(64, 64)
    prompt, negative = (
        base.family.condition(base.encode_prompt(text), framing) for text in ("a red octopus on a beach", "")
    )
    return Picture(trajectory, prompt=prompt, negative=negative, guidance_scale=5.0)


@pytest.mark.parametrize(
    ("name", "karras"),
    [
        ("ddim", False),
        ("kdpm2", True),
        *(
            pytest.param(n, k, marks=pytest.mark.soak)
            for n in ("euler", "lms", "heun")
            for k in (False, True)
        ),
    ],
)
def test_clean_latents_are_the_schedulers_own(base: BaseModel, name: str, karras: bool) -> None:
    options = SchedulerOptions(use_karras_sigmas=True) if karras else SchedulerOptions()
    picture = begun(base, name, 4, options)
    trajectory = picture.trajectory
    own: list[torch.Tensor] = []
    step = trajectory.scheduler.step

    def spied(*args: object, **keywords: object) -> object:
        told = step(*args, **{**keywords, "return_dict": True})
        own.append(told.pred_original_sample)
        return (told.prev_sample,)

    trajectory.scheduler.step = spied
    alphas = trajectory.scheduler.alphas_cumprod
    while not trajectory.finished:
        Denoiser(base.unet, base.scheduler_config).step([picture], 2)
        assert trajectory.outlook is not None
        clean = trajectory.outlook.clean(alphas, trajectory.prediction_type)
        assert (clean - own[-1][0]).abs().max() <= 0.02 * own[-1].abs().max()


@pytest.mark.parametrize(
    "name",
    [
        "dpmpp-2m",
        "pndm",
        *(pytest.param(n, marks=pytest.mark.soak) for n in ("unipc", "deis", "ddpm", "dpmpp-sde", "lcm")),
    ],
)
def test_the_last_outlook_is_the_picture(base: BaseModel, name: str) -> None:
    """Schedulers that do not tell: near the end the guess is what comes out."""
    picture = begun(base, name, 8, SchedulerOptions())
    while not picture.trajectory.finished:
        Denoiser(base.unet, base.scheduler_config).step([picture], 2)
    assert picture.trajectory.outlook is not None
    clean = picture.trajectory.outlook.clean(
        picture.trajectory.scheduler.alphas_cumprod, picture.trajectory.prediction_type
    )
    final = picture.trajectory.latents[0]
    assert (clean - final).abs().mean() <= 0.1 * final.abs().mean()


def test_colours_of_latents_are_those_of_the_decoded_picture(base: BaseModel) -> None:
    picture = begun(base, "ddim", 8, SchedulerOptions())
    while not picture.trajectory.finished:
        Denoiser(base.unet, base.scheduler_config).step([picture], 2)
    latents = picture.trajectory.latents[0]
    glance = LatentColours.fit(base).of(latents)
    decoded = F.avg_pool2d(base.decode_latents(latents)[None], base.latent_scale)[0]
    assert glance.shape == decoded.shape
    assert (glance - decoded).abs().mean() <= 0.08
    assert np.corrcoef(glance.flatten(), decoded.flatten())[0, 1] >= 0.9
