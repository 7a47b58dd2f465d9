"""Our pictures against diffusers' own pipelines: every family with every scheduler of the contract."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from atelier_server.core import SCHEDULERS, SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.schedulers import _REGISTRY
from atelier_server.diffusion.trajectory import Trajectory
from tests.bases import FAMILIES, PIXELS, peer, save_base

PROMPT = "a red octopus on a beach"
STEPS, SEED = 5, 7
ALL = list(product(FAMILIES, SCHEDULERS, (6.0, 1.0)))
SAMPLE = random.Random(4).sample(ALL, 14)


@dataclass(frozen=True)
class Case:
    """One picture's settings; `negative` "" is none given."""

    scheduler: str
    scale: float
    negative: str = ""
    width: int = PIXELS
    height: int = PIXELS


Pairs = dict[str, tuple[BaseModel, Any]]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Of every family our base and their pipeline."""
    folders = {family: save_base(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}
    return {name: (load_base(str(folder), "cpu"), peer(name, folder)) for name, folder in folders.items()}


def ours(base: BaseModel, case: Case) -> np.ndarray:
    framing = Framing.whole(case.width, case.height)
    trajectory = Trajectory.begin(
        case.scheduler,
        base.scheduler_config,
        options=SchedulerOptions(),
        num_inference_steps=STEPS,
        seed=SEED,
        shape=base.latent_shape(case.width, case.height),
        device=base.device,
        dtype=base.dtype,
    )
    negative = base.family.condition(base.encode_negative(case.negative), framing)
    picture = Picture(
        trajectory,
        prompt=base.family.condition(base.encode_prompt(PROMPT), framing),
        negative=negative if case.scale > 1 else None,
        guidance_scale=case.scale,
    )
    denoiser = Denoiser(base.unet, base.scheduler_config)
    while not trajectory.finished:
        denoiser.step([picture], 2)
    return base.decode_latents(trajectory.latents[0]).permute(1, 2, 0).numpy()


def theirs(base: BaseModel, pipeline: Any, case: Case) -> np.ndarray:
    class_name, overrides = _REGISTRY[case.scheduler]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(base.scheduler_config, **overrides)
    return pipeline(
        PROMPT,
        negative_prompt=case.negative or None,
        num_inference_steps=STEPS,
        guidance_scale=case.scale,
        width=case.width,
        height=case.height,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).images[0]


def check(pairs: Pairs, family: str, case: Case) -> None:
    base, pipeline = pairs[family]
    assert base.family.name == family
    a, b = ours(base, case), theirs(base, pipeline, case)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1 / 255


@pytest.mark.parametrize(("family", "scheduler", "scale"), SAMPLE)
def test_a_sample_of_families_and_schedulers(pairs: Pairs, family: str, scheduler: str, scale: float) -> None:
    check(pairs, family, Case(scheduler, scale))


@pytest.mark.soak
@pytest.mark.parametrize(("family", "scheduler", "scale"), ALL)
def test_every_family_with_every_scheduler(pairs: Pairs, family: str, scheduler: str, scale: float) -> None:
    check(pairs, family, Case(scheduler, scale))


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_and_other_sizes(pairs: Pairs, family: str) -> None:
    """SDXL's time ids follow the size; its zeros stand for an empty negative prompt only."""
    check(pairs, family, Case("euler", 6.0, negative="a blue fish", width=96))
