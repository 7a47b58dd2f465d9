"""Small trainings on the embedded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.trainer import Trainer


@dataclass(frozen=True)
class Studio:
    """What a trainer needs, and trainers."""

    base: BaseModel
    bank: SlotBank
    denoiser: Denoiser
    store: AdapterStore
    job: TrainingJob

    def trainer(self, *, resume_step: int = 0, version: int = 1, **changes: Any) -> Trainer:
        """A trainer that is ready for its first step."""
        job = replace(
            self.job,
            recipe=replace(self.job.recipe, **changes),
            resume_step=resume_step,
            version=version,
        )
        trainer = Trainer(job, base=self.base, denoiser=self.denoiser, bank=self.bank, store=self.store)
        for _ in trainer.prepare():
            pass
        return trainer


@pytest.fixture(scope="session")
def resident() -> tuple[BaseModel, SlotBank]:
    base = load_base("pocket", "cpu")
    bank = SlotBank(slots=4, max_rank=16)
    for component in ("unet", *base.family.text_encoders):
        bank.wrap(base.modules[component], component)
    return base, bank


@pytest.fixture
def studio(resident: tuple[BaseModel, SlotBank], tmp_path: Path) -> Studio:
    return furnished(resident, tmp_path)


@pytest.fixture(scope="session")
def studio_of_a_session(
    resident: tuple[BaseModel, SlotBank], tmp_path_factory: pytest.TempPathFactory
) -> Studio:
    """For tests that publish nothing."""
    return furnished(resident, tmp_path_factory.mktemp("studio"))


def furnished(resident: tuple[BaseModel, SlotBank], folder: Path) -> Studio:
    base, bank = resident
    store = AdapterStore(folder / "adapters")
    for new_version in (False, True):
        store.create_version(
            name="otto",
            trigger="otto",
            base_model="pocket",
            base_sha256=base.sha256,
            training="otto-1",
            new_version=new_version,
        )
    recipe = Recipe(
        instance_prompt="otto the octopus",
        resolution=32,
        max_train_steps=12,
        train_batch_size=2,
        rank=4,
        lora_alpha=8.0,
        learning_rate=1e-3,
        seed=5,
    )
    job = TrainingJob(id="otto-1", name="otto", version=1, recipe=recipe, images=tuple(pictures_in(folder)))
    return Studio(base, bank, Denoiser(base.unet, base.scheduler_config), store, job)


def pictures_in(folder: Path) -> list[TrainingImage]:
    sizes = [(40, 40), (60, 40), (33, 80)]
    return [
        TrainingImage(
            str(noise_picture(folder / f"{number}.png", size, number)),
            "otto in the snow" if number == 1 else "",
        )
        for number, size in enumerate(sizes)
    ]


@pytest.fixture
def pictures(tmp_path: Path) -> list[TrainingImage]:
    return pictures_in(tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, size: tuple[int, int], seed: int = 0) -> Path:
        return noise_picture(tmp_path / name, size, seed)

    return make


def noise_picture(path: Path, size: tuple[int, int], seed: int) -> Path:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path
