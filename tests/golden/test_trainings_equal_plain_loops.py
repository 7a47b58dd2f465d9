"""Every method on every family against a plain PEFT and diffusers loop (`loops`) on the same latents, noise
and timesteps: losses and gradients of 12 steps, alone, beside another training, with pictures in between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.company import Gradients, MicroBatch, StepReport, micro_step
from atelier_server.training.trainer import Trainer
from tests.bases import FAMILIES, peer, save_base
from tests.golden.loops import Drawn, PlainLoop
from tests.unit.adapters.tiny import EVERYTHING, adapter_for

STEPS = 12
RECIPE = Recipe(
    instance_prompt="a <otto> octopus",
    resolution=64,
    max_train_steps=STEPS,
    train_batch_size=3,
    batch_bucket=8,
    rank=4,
    lora_alpha=8.0,
    learning_rate=1e-3,
    seed=11,
)
WORDS = {"placeholder_tokens": ("<otto>",), "initializer_token": "octopus"}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "text": {"train_text_encoder": True, "text_encoder_lr": 5e-4},
    "layers": {"target_modules": ("attention", "feed_forward", "convolutions"), "use_rslora": True},
    "dora": {"target_modules": ("attention", "convolutions"), "use_dora": True, "train_text_encoder": True},
    "pissa": {"init_lora_weights": "pissa", "rank": 4},
    "olora": {"init_lora_weights": "olora", "rank": 4},
    "orthogonal": {"init_lora_weights": "orthogonal", "use_rslora": True},
    "textual_inversion": {**WORDS, "method": "textual_inversion", "num_vectors": 2},
    "pivotal": {**WORDS, "method": "pivotal", "train_text_encoder_ti_frac": 0.4, "token_lr": 1e-2},
    "pivotal+dreambooth": {**WORDS, "method": "pivotal", "pivotal_method": "dreambooth"},
    "dreambooth": {"method": "dreambooth", "learning_rate": 1e-4},
    "dreambooth+text": {
        "method": "dreambooth",
        "train_text_encoder": True,
        "learning_rate": 1e-4,
        "text_encoder_lr": 5e-5,
    },
}
BESIDE = ("alone", "shared", "serving")
# What `make test` takes: every method, every family, every company.
QUICK = {
    ("lora", "sd1", "alone"),
    ("lora", "sd2", "serving"),
    ("text", "sdxl", "shared"),
    ("dora", "sd2", "shared"),
    ("pissa", "sd1", "serving"),
    ("olora", "sdxl", "alone"),
    ("textual_inversion", "sd1", "shared"),
    ("pivotal", "sdxl", "serving"),
    ("dreambooth+text", "sd1", "serving"),
}
CASES = [
    pytest.param(case, id="-".join(case), marks=() if case in QUICK else pytest.mark.soak)
    for case in itertools.product(METHODS, FAMILIES, BESIDE)
]


@dataclass
class Recorded:
    """A training in its company, with an ear at what it draws, loses and is given."""

    trainer: Trainer
    drawn: list[Drawn] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)

    def begin(self) -> MicroBatch:
        batch = self.trainer.begin()
        own = self.trainer._drawn
        assert own is not None
        captions = [caption or "" for caption in own.captions]
        self.drawn.append(Drawn(own.latents, own.noise, own.timesteps, captions))
        return batch

    def finish(self, loss: Tensor, gradients: Gradients) -> StepReport | None:
        names = self.trainer._learning.names
        self.losses.append(loss.item())
        self.gradients.append(
            {name: g.clone() for name, g in zip(names, gradients, strict=True) if g is not None}
        )
        return self.trainer.finish(loss, gradients)


@dataclass
class Studio:
    """A resident base with two adapters in its slots, and trainings on it."""

    base: BaseModel
    bank: SlotBank
    store: AdapterStore
    images: Sequence[TrainingImage]

    def __post_init__(self) -> None:
        self.denoiser = Denoiser(self.base.unet, self.base.scheduler_config)
        self._painted: list[Tensor] = []

    def training(self, name: str, recipe: Recipe) -> Trainer:
        self.store.create_version(
            name=name, trigger="", base_model="", base_sha256="", training=name, new_version=False
        )
        job = TrainingJob(id=name, name=name, version=1, recipe=recipe, images=tuple(self.images))
        trainer = Trainer(job, base=self.base, denoiser=self.denoiser, bank=self.bank, store=self.store)
        for _ in trainer.prepare():
            pass
        return trainer

    @torch.no_grad()
    def paint(self) -> None:
        """A forward of four rows with the slots' adapters; the same bits every time."""
        rows = self.bank.gather([[(1, 1.0)], [], [(1, 0.5), (2, -1.0)], [(2, 1.0)]])
        latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        text = self.base.encode_prompt("a red house")
        conditioning = Conditioning.stack([self.base.family.condition(text, Framing.whole(64, 64))] * 4)
        with self.bank.use(rows):
            self._painted.append(self.denoiser.predict(latents, torch.full((4,), 500.0), conditioning))
        assert torch.equal(self._painted[0], self._painted[-1])


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[TrainingImage]:
    folder = tmp_path_factory.mktemp("images")
    made = []
    for number in range(4):
        values = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{number}.png")
        caption = "a <otto> octopus in the snow" if number == 1 else ""
        made.append(TrainingImage(str(folder / f"{number}.png"), caption))
    return made


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda family: save_base(family, tmp_path_factory.mktemp(family)))


@pytest.fixture
def studio_of(
    folder_of: Callable[[str], Path], images: list[TrainingImage], tmp_path: Path
) -> Callable[[str], Studio]:
    def make(family: str) -> Studio:
        base = load_base(str(folder_of(family)), "cpu")
        bank = SlotBank(slots=2, max_rank=16)
        for component in ("unet", *base.family.text_encoders):
            bank.wrap(base.modules[component], component)
        for slot in (1, 2):
            bank.load(slot, adapter_for(bank, rank=8, alpha=8, seed=slot, targets=EVERYTHING))
        return Studio(base, bank, AdapterStore(tmp_path / "adapters"), images)

    return make


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_the_plain_loops(
    case: tuple[str, str, str],
    studio_of: Callable[[str], Studio],
    folder_of: Callable[[str], Path],
) -> None:
    method, family, beside = case
    studio = studio_of(family)
    weights = dict(_weights(studio.base))
    members = [Recorded(studio.training("otto", replace(RECIPE, **METHODS[method])))]
    if beside == "shared":
        other = replace(RECIPE, rank=7, lora_alpha=3.0, learning_rate=3e-3, train_batch_size=2, seed=5)
        members.append(Recorded(studio.training("bolt", other)))
    together = beside == "shared" and members[0].trainer.company is not None
    for step in range(STEPS):
        if together:
            _check(micro_step(members))
        else:
            for member in members:
                _check(micro_step([member]))
        if beside == "serving":
            studio.paint()
            if step == 5:
                members[0].trainer.publish()
    assert all(torch.equal(before, weights[name]) for name, before in _weights(studio.base, copy=False))
    for member in members:
        _compare(member, peer(family, folder_of(family)))


def _check(outcomes: Sequence[object]) -> None:
    assert all(isinstance(outcome, StepReport) for outcome in outcomes), outcomes


def _weights(base: BaseModel, *, copy: bool = True) -> Iterator[tuple[str, Tensor]]:
    for component, module in base.modules.items():
        for name, parameter in module.named_parameters():
            yield f"{component}.{name}", parameter.detach().clone() if copy else parameter


def _compare(member: Recorded, pipeline: Any) -> None:
    """The plain loop on what the training drew. Losses and gradients agree to 1e-5; gradients also to 1e-3 of
    their own norm, as most of them are small."""
    recipe = member.trainer._recipe
    layers = [name.removeprefix("unet.") for name in member.trainer.adapter().low_rank if "unet." in name]
    loop = PlainLoop(recipe, pipeline, layers)
    for batch in member.drawn:
        loop.step(batch)
    assert len(member.losses) == STEPS
    assert max(abs(a - b) for a, b in zip(member.losses, loop.losses, strict=True)) < 1e-5
    for step, (ours, theirs) in enumerate(zip(member.gradients, loop.gradients, strict=True)):
        assert ours.keys() <= theirs.keys()
        norm = torch.stack([theirs[name].norm() for name in theirs]).norm()
        assert norm > 0, step
        error = torch.zeros(())
        for name, expected in theirs.items():
            difference = ours.get(name, torch.zeros_like(expected)).reshape(expected.shape) - expected
            assert difference.abs().max() < 1e-5, (step, name)
            error = error + difference.square().sum()
        assert error.sqrt() < 1e-3 * norm, step
