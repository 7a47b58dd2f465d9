"""Trainings on a GPU: the plain loop's losses and gradients, and every optimizer there is."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import TrainingImage
from atelier_server.diffusion.base import load_base
from atelier_server.training.company import StepReport, micro_step
from atelier_server.training.optimizers import optimizers_on
from tests.bases import peer, save_base
from tests.golden.loops import Drawn, PlainLoop
from tests.golden.test_trainings_equal_plain_loops import METHODS, RECIPE, Recorded, Studio
from tests.gpu.device import DEVICE
from tests.pictures import soft_colours

pytestmark = pytest.mark.gpu
STEPS = 5
SHORT = replace(RECIPE, max_train_steps=STEPS)


def studio(family: str, root: Path) -> Studio:
    base = load_base(str(save_base(family, root / "base")), DEVICE, "float32")
    bank = SlotBank(slots=2, max_rank=16)
    for component in ("unet", *base.family.text_encoders):
        bank.wrap(base.modules[component], component)
    (root / "picture.png").write_bytes(soft_colours())
    images = [TrainingImage(str(root / "picture.png"), caption) for caption in ("", "an octopus")]
    return Studio(base, bank, AdapterStore(root / "adapters"), images)


@pytest.mark.parametrize("method", ["lora", "text", "dora", "pivotal"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_losses_and_gradients_are_the_plain_loops_on_the_cpu(
    family: str, method: str, tmp_path: Path
) -> None:
    """To 1e-4 of the loss and 1e-2 of the gradients' norm: two devices sum in different orders."""
    place = studio(family, tmp_path)
    member = Recorded(place.training("otto", replace(SHORT, **METHODS[method])))
    for _ in range(STEPS):
        (outcome,) = micro_step([member])
        assert isinstance(outcome, StepReport), outcome
    layers = [name.removeprefix("unet.") for name in member.trainer.adapter().low_rank if "unet." in name]
    loop = PlainLoop(member.trainer._recipe, peer(family, tmp_path / "base"), layers)
    for drawn in member.drawn:
        loop.step(Drawn(drawn.latents.cpu(), drawn.noise.cpu(), drawn.timesteps.cpu(), drawn.captions))
    assert member.losses == pytest.approx(loop.losses, abs=1e-4, rel=1e-4)
    for step, (ours, theirs) in enumerate(zip(member.gradients, loop.gradients, strict=True)):
        norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
        assert all(gradient.device.type == DEVICE for gradient in ours.values())
        off = [_off(ours.get(name), expected) for name, expected in theirs.items()]
        assert torch.stack(off).norm() < 1e-2 * norm, step


def _off(ours: Tensor | None, expected: Tensor) -> Tensor:
    zeros = torch.zeros_like(expected)
    difference = (zeros if ours is None else ours.cpu().reshape(expected.shape)) - expected
    norm: Tensor = torch.linalg.vector_norm(difference)
    return norm


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "prodigy"])
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_every_optimizer_learns(optimizer: str, precision: str, tmp_path: Path) -> None:
    if optimizer not in optimizers_on(torch.device(DEVICE)):
        pytest.skip(f"no {optimizer} here")
    rate = 1.0 if optimizer == "prodigy" else 1e-3
    recipe = replace(SHORT, optimizer=optimizer, learning_rate=rate, mixed_precision=precision, rank=16)
    trainer = studio("sd1", tmp_path).training("otto", replace(recipe, gradient_checkpointing=True))
    before = trainer.adapter()
    reports = [trainer.train_step() for _ in range(STEPS)]
    assert all(math.isfinite(report.loss) for report in reports)
    after = trainer.adapter().low_rank
    assert any(not torch.equal(module.B, after[name].B) for name, module in before.low_rank.items())
    assert trainer.publish().id.step == STEPS
