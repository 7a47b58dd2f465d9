"""Each knob of a training against a plain PEFT and diffusers loop that has it, on what the training drew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from PIL import Image
from prodigyopt import Prodigy
from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import load_base
from atelier_server.diffusion.conditioning import Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.batch import Batch
from atelier_server.training.trainer import Trainer
from tests.bases import peer, save_base
from tests.golden.loops import PlainLoop

STEPS = 6
RECIPE = Recipe(
    instance_prompt="a sks octopus",
    class_prompt="an octopus",
    resolution=64,
    max_train_steps=STEPS,
    train_batch_size=2,
    rank=4,
    lora_alpha=8.0,
    learning_rate=1e-3,
    seed=11,
)
KNOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "min-snr": ("sd1", {"snr_gamma": 5.0}),
    "min-snr, velocity": ("sd2", {"snr_gamma": 5.0}),
    "noise offset": ("sd1", {"noise_offset": 0.1}),
    "prior preservation": ("sd1", {"with_prior_preservation": True, "prior_loss_weight": 0.7}),
    "output preservation": ("sd2", {"output_preservation_weight": 0.6}),
    "both, masked, min-snr": (
        "sdxl",
        {
            "with_prior_preservation": True,
            "output_preservation_weight": 0.6,
            "masked_loss": True,
            "snr_gamma": 2.0,
        },
    ),
    "masked loss": ("sd1", {"masked_loss": True}),
    "buckets": ("sdxl", {"aspect_ratio_buckets": True, "random_flip": True}),
    "nothing cached": (
        "sdxl",
        {"cache_latents": False, "cache_text_embeddings": False, "random_crop": True, "random_flip": True},
    ),
    "prodigy, averaged": ("sd1", {"optimizer": "prodigy", "learning_rate": 1.0, "use_ema": True}),
    "bf16": ("sd1", {"mixed_precision": "bf16"}),
}


class KnobLoop(PlainLoop):
    """The scripts' loop with the knobs where they have them; output preservation as its authors tell it."""

    def _begin(self, phase: int) -> None:
        super()._begin(phase)
        everything = [p for group in self._groups[phase] for p in group.parameters.values()]
        self._average = EMAModel(everything, decay=self.recipe.ema_decay)
        if self.recipe.optimizer == "prodigy":
            self._optimizer = Prodigy(
                everything,
                lr=self.recipe.learning_rate,
                weight_decay=self.recipe.adam_weight_decay,
                decouple=True,
                use_bias_correction=True,
                safeguard_warmup=True,
            )
            self._lr_scheduler = get_scheduler("constant", self._optimizer)

    def step(self, batch: Any) -> None:
        super().step(batch)
        self._average.step([p for group in self._groups[0] for p in group.parameters.values()])

    def averaged(self) -> dict[str, Tensor]:
        names = [name for group in self._groups[0] for name in group.parameters]
        return dict(zip(names, self._average.shadow_params, strict=True))

    def _loss(self, batch: Any) -> Tensor:
        recipe, scheduler, own = self.recipe, self._noise_scheduler, batch.instances
        count = own * (2 if recipe.with_prior_preservation else 1)
        latents, noise, timesteps = batch.latents[:count], batch.noise[:count], batch.timesteps[:count]
        noisy = scheduler.add_noise(latents, noise, timesteps)
        captions, framings = batch.captions[:count], batch.framings[:count]
        prediction = self._predicted(noisy, timesteps, captions, framings)
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        squares = F.mse_loss(prediction.float(), target, reduction="none")
        if recipe.masked_loss:
            squares = squares * batch.masks[:count]
        rows = squares.mean((1, 2, 3))
        weights = torch.ones(own)
        if recipe.snr_gamma is not None:
            kept = scheduler.alphas_cumprod[timesteps[:own]]
            snr = kept / (1 - kept)
            weights = snr.clamp(max=recipe.snr_gamma) / (snr + 1 if velocity else snr)
        loss = (rows[:own] * weights).mean()
        if recipe.with_prior_preservation:
            assert set(captions[own:]) == {recipe.class_prompt}
            loss = loss + recipe.prior_loss_weight * rows[own:].mean()
        if recipe.output_preservation_weight:
            of_class = [
                caption.replace(recipe.instance_prompt, recipe.class_prompt) for caption in captions[:own]
            ]
            rows_again = noisy[:own], timesteps[:own], of_class, framings[:own]
            unet = self.pipeline.unet
            unet.disable_adapters()
            with torch.no_grad():
                wanted = self._predicted(*rows_again)
            unet.enable_adapters()
            drift = F.mse_loss(self._predicted(*rows_again), wanted)
            loss = loss + recipe.output_preservation_weight * drift
        return loss

    def _predicted(
        self, noisy: Tensor, timesteps: Tensor, captions: Sequence[str], framings: Sequence[Framing]
    ) -> Tensor:
        states, added = self._conditioning(captions)
        if added is not None:
            told = [[*f.original, *f.corner, *f.target] for f in framings]
            added = {**added, "time_ids": torch.tensor(told, dtype=torch.float32)}
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.mixed_precision == "bf16"):
            prediction: Tensor = self.pipeline.unet(noisy, timesteps, states, added_cond_kwargs=added).sample
        return prediction


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingImage]:
    """Of three shapes, half transparent; the first names the subject in a sentence of its own."""
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number, (width, height) in enumerate([(64, 64), (96, 64), (64, 96), (70, 64)]):
        values = np.random.default_rng(number).integers(0, 256, (height, width, 4), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        caption = "" if number else "a sks octopus in the snow"
        made.append(TrainingImage(str(folder / f"{number}.png"), caption))
    return made


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_base(family, tmp_path_factory.mktemp(family)))


QUICK = {"both, masked, min-snr", "min-snr, velocity", "buckets", "prodigy, averaged", "bf16"}


@pytest.mark.parametrize(
    "knob", [pytest.param(k, marks=() if k in QUICK else pytest.mark.soak) for k in KNOBS]
)
def test_losses_and_gradients_are_the_plain_loops(
    knob: str, folder_of: Callable[[str], Path], images: list[TrainingImage], tmp_path: Path
) -> None:
    family, changes = KNOBS[knob]
    recipe = replace(RECIPE, **changes)
    base = load_base(str(folder_of(family)), "cpu")
    bank = SlotBank(slots=1, max_rank=8)
    for component in ("unet", *base.family.text_encoders):
        bank.wrap(base.modules[component], component)
    store = AdapterStore(tmp_path / "adapters")
    store.create_version(
        name="otto", trigger="", base_model="", base_sha256="", training="otto", new_version=False
    )
    of_class = tuple((number, image.path) for number, image in enumerate(images[:3]))
    job = TrainingJob("otto", "otto", 1, recipe, tuple(images), class_images=of_class)
    denoiser = Denoiser(base.unet, base.scheduler_config)
    trainer = Trainer(job, base=base, denoiser=denoiser, bank=bank, store=store)
    for _ in trainer.prepare():
        pass
    layers = [name.removeprefix("unet.") for name in trainer.adapter().low_rank]
    loop = KnobLoop(recipe, peer(family, folder_of(family)), layers)
    tolerance = 1e-5 if recipe.mixed_precision != "bf16" else 2e-2
    sizes = set()
    for step in range(STEPS):
        trainer.begin()  # draws it
        batch = trainer._drawn
        assert isinstance(batch, Batch)
        sizes.add(batch.latents.shape[2:])
        loss = trainer.train_step().loss
        loop.step(batch)
        assert abs(loss - loop.losses[-1]) < tolerance * max(1.0, loss), step
    assert len(sizes) == (3 if recipe.aspect_ratio_buckets else 1)
    expected = loop.averaged() if recipe.use_ema else loop.parameters()
    learned = trainer.adapter().low_rank
    assert len(expected) == 2 * len(learned)
    for name, module in learned.items():
        for part, own in (("A", module.A), ("B", module.B)):
            difference = own - expected[f"{name}.{part}"]
            assert difference.abs().max() < (1e-4 if tolerance < 1e-2 else 2e-3), name
