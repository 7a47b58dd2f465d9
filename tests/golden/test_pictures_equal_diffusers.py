"""Our pictures against diffusers' own pipelines: every family, scheduler of the contract and mode."""

from __future__ import annotations

import io
import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image
from PIL import Image

from atelier_server.core import SCHEDULERS, InitImage, SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.init_image import InitImages
from atelier_server.diffusion.schedulers import _REGISTRY, all_options
from atelier_server.diffusion.trajectory import Trajectory
from tests.bases import FAMILIES, PIXELS, peer, save_base
from tests.options import OPTIONS
from tests.pictures import right_part, soft_colours

PROMPT = "a red octopus on a beach"
STEPS, SEED = 5, 7
MODES = {
    "text": AutoPipelineForText2Image,
    "image": AutoPipelineForImage2Image,
    "inpaint": AutoPipelineForInpainting,
}
ALL = list(product(FAMILIES, SCHEDULERS, MODES, (6.0, 1.0)))
PLAIN = SchedulerOptions()
SAMPLE = random.Random(4).sample(ALL, 20)


@dataclass(frozen=True)
class Case:
    """One picture's settings; `negative` None is none given."""

    scheduler: str
    scale: float
    negative: str | None = None
    width: int = PIXELS
    height: int = PIXELS
    mode: str = "text"
    strength: float = 0.7
    prompt: str = PROMPT
    clip_skip: int = 0
    options: SchedulerOptions = PLAIN

    @property
    def init(self) -> InitImage | None:
        if self.mode == "text":
            return None
        mask = right_part(self.width, self.height) if self.mode == "inpaint" else b""
        return InitImage(soft_colours(self.width, self.height), "", self.strength, mask)


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
        options=case.options,
        num_inference_steps=STEPS,
        seed=SEED,
        shape=base.latent_shape(case.width, case.height),
        device=base.device,
        dtype=base.dtype,
        init=InitImages(base).latents(case.init) if case.init else None,
        inpainting_unet=base.inpainting,
    )
    negative = base.family.condition(base.encode_negative(case.negative), framing)
    picture = Picture(
        trajectory,
        prompt=base.family.condition(base.encode_prompt(case.prompt, clip_skip=case.clip_skip), framing),
        negative=negative if case.scale > 1 else None,
        guidance_scale=case.scale,
    )
    denoiser = Denoiser(base.unet, base.scheduler_config)
    while not trajectory.finished:
        denoiser.step([picture], 2)
    return base.decode_latents(trajectory.latents[0]).permute(1, 2, 0).numpy()


def theirs(base: BaseModel, pipeline: Any, case: Case) -> np.ndarray:
    init, settings = case.init, {"width": case.width, "height": case.height}
    pipeline = MODES[case.mode].from_pipe(pipeline)
    pipeline.set_progress_bar_config(disable=True)
    class_name, overrides = _REGISTRY[case.scheduler]
    chosen = {**overrides, **{key: value for key, value in case.options.given.items() if key != "eta"}}
    pipeline.scheduler = getattr(diffusers, class_name).from_config(base.scheduler_config, **chosen)
    if init is not None:
        settings = {"image": opened(init.image), "strength": init.strength} | (settings if init.mask else {})
        settings |= {"mask_image": opened(init.mask)} if init.mask else {}
    return pipeline(
        case.prompt,
        negative_prompt=case.negative,
        clip_skip=case.clip_skip or None,
        num_inference_steps=STEPS,
        guidance_scale=case.scale,
        **settings,
        eta=case.options.eta or 0.0,
        generator=torch.Generator("cpu").manual_seed(SEED),
        output_type="np",
    ).images[0]


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file))


def check(pairs: Pairs, family: str, case: Case) -> None:
    base, pipeline = pairs[family]
    assert base.family.name == family
    a, b = ours(base, case), theirs(base, pipeline, case)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= 1 / 255


@pytest.mark.parametrize(("family", "scheduler", "mode", "scale"), SAMPLE)
def test_a_sample_of_all(pairs: Pairs, family: str, scheduler: str, mode: str, scale: float) -> None:
    check(pairs, family, Case(scheduler, scale, mode=mode))


@pytest.mark.soak
@pytest.mark.parametrize(("family", "scheduler", "mode", "scale"), ALL)
def test_every_family_scheduler_and_mode(
    pairs: Pairs, family: str, scheduler: str, mode: str, scale: float
) -> None:
    check(pairs, family, Case(scheduler, scale, mode=mode))


def _with_options() -> list[Any]:
    """Every option of every scheduler and mode; zero SNR is for a base that predicts more than noise."""
    chosen = [
        ("sd2" if option == "rescale_betas_zero_snr" else family, name, mode, option)
        for family, mode, (name, has) in product(FAMILIES, MODES, all_options())
        for option in OPTIONS
        if option in has
    ]
    every = sorted(set(chosen))
    quick = random.Random(5).sample(every, 12)
    return [pytest.param(*one, marks=() if one in quick else pytest.mark.soak) for one in every]


@pytest.mark.parametrize(("family", "scheduler", "mode", "option"), _with_options())
def test_every_option_in_every_mode(
    pairs: Pairs, family: str, scheduler: str, mode: str, option: str
) -> None:
    check(pairs, family, Case(scheduler, 6.0, mode=mode, options=OPTIONS[option]))


@pytest.mark.parametrize("mode", ["image", "inpaint"])
@pytest.mark.parametrize("strength", [0.21, 1.0])
def test_the_ends_of_strength(pairs: Pairs, mode: str, strength: float) -> None:
    """One step, and all: then inpainting begins at plain noise."""
    check(pairs, "sd1", Case("euler", 6.0, mode=mode, strength=strength))


@pytest.mark.parametrize(
    ("family", "scheduler", "strength"),
    [("sd1", "ddim", 1.0), ("sd2", "euler-a", 0.7), ("sdxl", "heun", 0.99)],
)
def test_inpainting_models(tmp_path: Path, family: str, scheduler: str, strength: float) -> None:
    """U-Nets of nine channels, which hear of the mask and of what is around it."""
    folder = save_base(family, tmp_path, in_channels=9)
    pair = {family: (load_base(str(folder), "cpu"), peer(family, folder))}
    assert pair[family][0].inpainting
    check(pair, family, Case(scheduler, 6.0, mode="inpaint", strength=strength))


@pytest.mark.parametrize("family", FAMILIES)
def test_negative_prompts_and_other_sizes(pairs: Pairs, family: str) -> None:
    """SDXL's time ids follow the size; its zeros stand for none at all, not for an empty one."""
    check(pairs, family, Case("euler", 6.0, negative=""))
    check(pairs, family, Case("euler", 6.0, negative="a blue fish", width=96))


@pytest.mark.parametrize("family", FAMILIES)
def test_unconditional_pictures(pairs: Pairs, family: str) -> None:
    check(pairs, family, Case("ddim", 1.0, prompt=""))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_of_the_text_encoders_left_out(pairs: Pairs, family: str) -> None:
    base, pipeline = pairs[family]
    # diffusers 0.42 looks for a part of the encoder that transformers 5 has dissolved.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    check(pairs, family, Case("euler", 6.0, negative="a blue fish", clip_skip=base.max_clip_skip))
