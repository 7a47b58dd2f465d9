"""Every option of every scheduler, and guidance_rescale, against diffusers' own pipeline."""

from __future__ import annotations

import random

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from atelier_server.core import SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.schedulers import (
    _REGISTRY,
    all_options,
    default_scheduler,
    make_scheduler,
    usable_schedulers,
)
from atelier_server.diffusion.trajectory import Trajectory
from tests.bases import peer, save_base
from tests.options import OPTIONS

PROMPT = "a red octopus on a beach"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[BaseModel, StableDiffusionPipeline]:
    folder = save_base("sd1", tmp_path_factory.mktemp("base"))
    base, pipeline = load_base(str(folder), "cpu"), peer("sd1", folder)
    # Predicting noise says nothing where there is only noise, as at the last timestep with zero SNR.
    base.scheduler_config["prediction_type"] = "v_prediction"
    return base, pipeline


def painted(base: BaseModel, name: str, options: SchedulerOptions) -> Tensor:
    """The latents [1, C, h, w] after four guided steps."""
    trajectory = Trajectory.begin(
        name,
        base.scheduler_config,
        options=options,
        num_inference_steps=4,
        seed=3,
        shape=base.latent_shape(64, 64),
        device=base.device,
        dtype=base.dtype,
    )
    prompt, negative = (
        base.family.condition(base.encode_prompt(text), Framing.whole(64, 64)) for text in (PROMPT, "")
    )
    picture = Picture(trajectory, prompt, negative, 5.0, 0.6)
    while not trajectory.finished:
        Denoiser(base.unet, base.scheduler_config).step([picture], 2)
    return trajectory.latents


ALL = [(name, option) for name, has in all_options() for option in OPTIONS if option in has]
SAMPLED = random.Random(4).sample(ALL, 14)


@pytest.mark.parametrize(
    ("name", "option"),
    [pytest.param(*pair, marks=() if pair in SAMPLED else pytest.mark.soak) for pair in ALL],
)
def test_every_option_equals_the_pipeline_of_diffusers(
    bases: tuple[BaseModel, StableDiffusionPipeline], name: str, option: str
) -> None:
    base, pipeline = bases
    options = OPTIONS[option]
    ours, plain = painted(base, name, options), painted(base, name, SchedulerOptions())
    pixels = base.decode_latents(ours[0]).permute(1, 2, 0).numpy()
    class_name, overrides = _REGISTRY[name]
    chosen = {key: value for key, value in options.given.items() if key != "eta"}
    pipeline.scheduler = getattr(diffusers, class_name).from_config(
        base.scheduler_config, **{**overrides, **chosen}
    )
    theirs = pipeline(
        PROMPT,
        num_inference_steps=4,
        guidance_scale=5.0,
        guidance_rescale=0.6,
        eta=options.eta or 0.0,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    assert np.abs(pixels - theirs).max() <= 1 / 255
    # lcm and tcd take their timesteps from their distillation, however they are spaced.
    if not (name in ("lcm", "tcd") and option == "timestep_spacing"):
        assert not torch.equal(ours, plain)


def test_what_cannot_be_used_where_the_picture_is_predicted_is_left_out() -> None:
    config = {"prediction_type": "sample", "_class_name": "PNDMScheduler"}
    works = []
    for name in _REGISTRY:
        scheduler = make_scheduler(name, config)
        scheduler.set_timesteps(4)
        latents = torch.ones(1, 4, 2, 2)
        scheduler.scale_model_input(latents, scheduler.timesteps[0])
        try:
            scheduler.step(latents, scheduler.timesteps[0], latents)
        except (NotImplementedError, ValueError):  # how their classes refuse it
            continue
        works.append(name)
    assert usable_schedulers(config) == tuple(works)
    assert set(usable_schedulers({"prediction_type": "epsilon"})) == set(_REGISTRY)
    assert default_scheduler(config) == "ddim"


def test_one_kind_of_sigmas_replaces_the_bases() -> None:
    config = {"use_karras_sigmas": True, "num_train_timesteps": 1000}
    scheduler = make_scheduler("euler", config, SchedulerOptions(use_beta_sigmas=True))
    assert (scheduler.config.use_karras_sigmas, scheduler.config.use_beta_sigmas) == (False, True)
    assert make_scheduler("euler", config).config.use_karras_sigmas
