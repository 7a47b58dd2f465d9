"""Our loop against diffusers' own pipeline, and the promises about a row's bits."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.training_utils import compute_snr

from atelier_server import pocket
from atelier_server.core import ROW_BUCKETS, SCHEDULERS, SchedulerOptions
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser, Picture
from atelier_server.diffusion.schedulers import _REGISTRY, default_scheduler
from atelier_server.diffusion.trajectory import Trajectory
from atelier_server.errors import InvalidRequest

PROMPT = "a red octopus on a beach"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("pocket", "cpu")


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline.from_pretrained(pocket.path(), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def condition(base: BaseModel, text: str) -> Conditioning:
    framing = Framing.whole(base.native_width, base.native_height)
    return base.family.condition(base.encode_prompt(text), framing)


def picture(
    base: BaseModel,
    *,
    scheduler: str,
    steps: int = 4,
    seed: int = 3,
    scale: float = 5.0,
) -> Picture:
    return Picture(
        trajectory=Trajectory.begin(
            scheduler,
            base.scheduler_config,
            options=SchedulerOptions(),
            num_inference_steps=steps,
            seed=seed,
            shape=base.latent_shape(base.native_width, base.native_height),
            device=base.device,
            dtype=base.dtype,
        ),
        prompt=condition(base, PROMPT),
        negative=condition(base, "") if scale > 1 else None,
        guidance_scale=scale,
    )


def run(denoiser: Denoiser, pictures: list[Picture], bucket: int) -> None:
    while live := [p for p in pictures if not p.trajectory.finished]:
        denoiser.step(live, bucket)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_equals_the_pipeline_of_diffusers(
    base: BaseModel, pipeline: StableDiffusionPipeline, name: str, scale: float
) -> None:
    ours = picture(base, scheduler=name, steps=6, scale=scale)
    run(Denoiser(base.unet, base.scheduler_config), [ours], 2)
    pixels = base.decode_latents(ours.trajectory.latents[0]).permute(1, 2, 0).numpy()

    class_name, overrides = _REGISTRY[name]
    pipeline.scheduler = getattr(diffusers, class_name).from_config(base.scheduler_config, **overrides)
    theirs = pipeline(
        PROMPT,
        num_inference_steps=6,
        guidance_scale=scale,
        generator=torch.Generator("cpu").manual_seed(3),
        output_type="np",
    ).images[0]
    assert np.abs(pixels - theirs).max() <= 1 / 255


def test_mixed_schedulers_steps_and_guidance_share_a_forward_and_keep_their_bits(base: BaseModel) -> None:
    denoiser = Denoiser(base.unet, base.scheduler_config)
    settings = [
        ("ddim", 3, 5.0),
        ("euler", 5, 1.0),
        ("euler-a", 4, 7.5),
        ("dpmpp-2m", 6, 3.0),
        ("unipc", 4, 1.0),
        ("dpmpp-2m-sde", 5, 9.0),
        ("heun", 3, 4.0),
    ]

    def one(i: int) -> Picture:
        name, steps, scale = settings[i]
        return picture(base, scheduler=name, steps=steps, seed=i, scale=scale)

    alone = [one(i) for i in range(len(settings))]
    for p in alone:
        run(denoiser, [p], 16)
    together = [one(i) for i in range(len(settings))]
    run(denoiser, list(reversed(together)), 16)
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a.trajectory.latents, b.trajectory.latents)


@pytest.mark.parametrize("bucket", ROW_BUCKETS)
def test_a_row_does_not_depend_on_its_place(base: BaseModel, bucket: int) -> None:
    denoiser = Denoiser(base.unet, base.scheduler_config)
    results = []
    for place in range(bucket):
        pictures = [picture(base, scheduler="ddim", steps=2, seed=100 + i, scale=1.0) for i in range(bucket)]
        pictures[place] = picture(base, scheduler="ddim", steps=2, seed=7, scale=1.0)
        run(denoiser, pictures, bucket)
        results.append(pictures[place].trajectory.latents)
    assert all(torch.equal(results[0], r) for r in results)


def test_a_batch_larger_than_its_bucket_is_refused(base: BaseModel) -> None:
    pictures = [picture(base, scheduler="ddim") for _ in range(2)]
    with pytest.raises(ValueError, match="4 rows do not fit a bucket of 2"):
        Denoiser(base.unet, base.scheduler_config).step(pictures, 2)


@pytest.mark.parametrize(("name", "steps"), [("pndm", 1), ("lcm", 200), ("tcd", 51)])
def test_steps_that_a_scheduler_cannot_do_are_the_users_to_change(
    base: BaseModel, name: str, steps: int
) -> None:
    with pytest.raises(InvalidRequest, match=f"num_inference_steps: {steps} do not suit {name}"):
        picture(base, scheduler=name, steps=steps)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_loss_is_the_error_against_the_target_of_the_base(base: BaseModel, prediction_type: str) -> None:
    config = {**base.scheduler_config, "prediction_type": prediction_type}
    denoiser = Denoiser(base.unet, config)
    noise_scheduler = diffusers.DDPMScheduler.from_config(config)
    generator = torch.Generator().manual_seed(0)
    shape = (3, *base.latent_shape(base.native_width, base.native_height))
    latents, noise = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    timesteps = torch.tensor([10, 500, 990])
    prompts = Conditioning.stack([condition(base, PROMPT)] * 3)
    noisy = noise_scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        prediction = base.unet(noisy, timesteps, prompts.prompt_embeds).sample
        target = {
            "epsilon": noise,
            "v_prediction": noise_scheduler.get_velocity(latents, noise, timesteps),
            "sample": latents,
        }[prediction_type]
        expected = ((prediction - target) ** 2).mean((1, 2, 3))
        assert torch.equal(denoiser.noisy(latents, noise, timesteps), noisy)
        ours = denoiser.predict(noisy, timesteps, prompts)
        error = denoiser.error(ours, latents, noise, timesteps)
        weighted = denoiser.error(ours, latents, noise, timesteps, snr_gamma=5.0)
    assert torch.allclose(error, expected, rtol=1e-6)
    snr = compute_snr(noise_scheduler, timesteps)
    divisor = snr + 1 if prediction_type == "v_prediction" else snr
    assert torch.allclose(weighted, expected * torch.minimum(snr, torch.tensor(5.0)) / divisor, rtol=1e-6)


def test_the_contracts_schedulers_are_all_there() -> None:
    assert tuple(_REGISTRY) == SCHEDULERS
    assert default_scheduler({"_class_name": "PNDMScheduler"}) == "pndm"
    assert default_scheduler({"_class_name": "DPMSolverMultistepScheduler"}) == "dpmpp-2m"
    assert default_scheduler({"_class_name": "SomethingElse"}) == "ddim"
