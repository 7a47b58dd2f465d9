"""A private U-Net: what becomes of it, what is published of it, and what the resident base sees of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import DenseModule
from atelier_server.adapters.store import AdapterStore
from atelier_server.core import Recipe, TrainingJob
from atelier_server.diffusion.base import BaseModel, load_base
from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.errors import DataLoss, NonfiniteLoss, StorageFull
from atelier_server.training.trainer import Trainer
from tests.bases import peer, save_base
from tests.unit.training.conftest import pictures_in

RECIPE = Recipe(
    instance_prompt="otto the octopus",
    resolution=64,
    method="dreambooth",
    max_train_steps=6,
    train_batch_size=2,
    rank=4,
    learning_rate=1e-3,
    seed=5,
)
Open = Callable[..., Trainer]


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.soak)])
def resident(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    return load_base(str(save_base(request.param, tmp_path_factory.mktemp("base"))), "cpu")


@pytest.fixture(scope="module")
def bank(resident: BaseModel) -> SlotBank:
    bank = SlotBank(slots=2, max_rank=32)
    for component in ("unet", *resident.family.text_encoders):
        bank.wrap(resident.modules[component], component)
    return bank


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    store = AdapterStore(tmp_path / "adapters")
    for new_version in (False, True):
        store.create_version(
            name="otto", trigger="", base_model="", base_sha256="", training="t", new_version=new_version
        )
    return store


@pytest.fixture
def open_trainer(resident: BaseModel, bank: SlotBank, store: AdapterStore, tmp_path: Path) -> Open:
    images = tuple(pictures_in(tmp_path))
    denoiser = Denoiser(resident.unet, resident.scheduler_config)

    def make(*, resume_step: int = 0, version: int = 1, **changes: Any) -> Trainer:
        job = TrainingJob(
            id="t",
            name="otto",
            version=version,
            recipe=replace(RECIPE, **changes),
            images=images,
            resume_step=resume_step,
            bases=str(tmp_path / "bases"),
        )
        trainer = Trainer(job, base=resident, denoiser=denoiser, bank=bank, store=store)
        for _ in trainer.prepare():
            pass
        return trainer

    return make


def run(trainer: Trainer, steps: int) -> Trainer:
    for _ in range(steps):
        trainer.train_step()
    return trainer


def publish(trainer: Trainer) -> float:
    for _ in trainer.publishing():
        pass
    kept = trainer.publish().kept_share
    assert kept is not None
    return kept


def private_unet(trainer: Trainer) -> Any:
    return trainer._method.full_modules["unet"]


@torch.no_grad()
def prediction(base: BaseModel, unet: Any) -> Tensor:
    latents = torch.randn(1, *base.latent_shape(64, 64), generator=torch.Generator().manual_seed(0))
    text = base.encode_prompt("otto the octopus")
    row = Conditioning.stack([base.family.condition(text, Framing.whole(64, 64))])
    return Denoiser(unet, base.scheduler_config).predict(latents, torch.tensor([500]), row)


def test_the_resident_base_is_not_touched(resident: BaseModel, open_trainer: Open) -> None:
    before = {n: p.clone() for m in resident.modules.values() for n, p in m.named_parameters()}
    unet_before = {name: p.clone() for name, p in resident.unet.named_parameters()}
    trainer = run(open_trainer(train_text_encoder=True), 2)
    publish(trainer)
    after = {n: p for m in resident.modules.values() for n, p in m.named_parameters()}
    assert all(torch.equal(before[name], p) and not p.requires_grad for name, p in after.items())
    private = dict(private_unet(trainer).named_parameters())
    assert private.keys() == unet_before.keys()
    assert not any(torch.equal(private[name], p) for name, p in unet_before.items() if p.dim() > 1)
    assert trainer.company is None


def test_the_adapter_is_the_private_unet(resident: BaseModel, bank: SlotBank, open_trainer: Open) -> None:
    """With all ranks, norms and biases it predicts what the private U-Net does; with fewer, nearly."""
    trainer = run(open_trainer(rank=32), 3)
    assert publish(trainer) == pytest.approx(1.0, abs=1e-4)
    adapter = trainer.adapter()
    assert any(isinstance(module, DenseModule) for module in adapter.modules.values())
    bank.load(1, adapter)
    expected = prediction(resident, private_unet(trainer))
    with bank.use(bank.gather([[(1, 1.0)]])):
        painted = prediction(resident, resident.unet)
    plain = prediction(resident, resident.unet)
    bank.clear(1)
    assert (painted - expected).abs().max() < 0.02 * (plain - expected).abs().max()


def test_a_smaller_rank_keeps_less_and_says_so(store: AdapterStore, open_trainer: Open) -> None:
    shares = []
    for version, rank in ((1, 1), (2, 8)):
        trainer = run(open_trainer(rank=rank, version=version), 2)
        shares.append(publish(trainer))
        assert store.version("otto", version).checkpoints[-1].kept_share == shares[-1]
        assert max(module.rank for module in trainer.adapter().low_rank.values()) == rank
    assert 0.2 < shares[0] < shares[1] < 1


@pytest.mark.parametrize("text", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_it_goes_on_to_the_same_bits(open_trainer: Open, text: bool) -> None:
    undisturbed = open_trainer(train_text_encoder=text)
    run(undisturbed, 2)
    publish(undisturbed)
    resumed = run(open_trainer(resume_step=2, train_text_encoder=text), 2)
    run(undisturbed, 2)
    ours, theirs = resumed._parameters(), undisturbed._parameters()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_the_full_weights_are_kept_as_a_base(resident: BaseModel, open_trainer: Open, tmp_path: Path) -> None:
    """One that paints what the trainer's own U-Net and text encoder paint; older ones are gone."""
    trainer = open_trainer(train_text_encoder=True)
    for _ in range(2):
        run(trainer, 1)
        publish(trainer)
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["2"]
    served = load_base(str(tmp_path / "bases" / "2"), "cpu")
    assert served.family is resident.family
    for component, module in trainer._method.full_modules.items():
        kept = dict(served.modules[component].named_parameters())
        assert all(torch.equal(kept[name], p) for name, p in module.named_parameters())
    pipeline = peer(resident.family.name, tmp_path / "bases" / "2")
    ours = resident.pipeline_with(trainer._method.full_modules)
    ours.set_progress_bar_config(disable=True)
    pictures = [
        pipe(
            "otto the octopus",
            num_inference_steps=4,
            height=64,
            width=64,
            generator=torch.Generator().manual_seed(3),
            output_type="pt",
        ).images
        for pipe in (pipeline, ours)
    ]
    assert (pictures[0] - pictures[1]).abs().max() <= 1 / 255


def test_a_full_disk_is_told_and_leaves_nothing(
    open_trainer: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = run(open_trainer(), 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(trainer._base._pipeline), "save_pretrained", full)
    with pytest.raises(StorageFull):
        publish(trainer)
    assert not list((tmp_path / "bases").iterdir())
    monkeypatch.undo()
    publish(trainer)
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["1"]


def test_the_state_is_kept_beside_the_base_until_the_last_step(
    store: AdapterStore, open_trainer: Open, tmp_path: Path
) -> None:
    trainer = run(open_trainer(max_train_steps=3), 2)
    publish(trainer)
    published = store.version("otto", 1).checkpoints[-1]
    weights = sum(p.nbytes for p in private_unet(trainer).parameters())
    assert sum(file.size_bytes for file in published.files.values()) < weights
    assert (tmp_path / "bases" / "2" / "training").is_dir()
    run(trainer, 1)
    publish(trainer)
    assert not (tmp_path / "bases" / "3" / "training").exists()
    ended = open_trainer(max_train_steps=3, resume_step=3)
    assert ended.published is not None
    assert ended.published.id.step == 3


def test_a_training_whose_kept_state_is_gone_says_so(open_trainer: Open, tmp_path: Path) -> None:
    publish(run(open_trainer(), 1))
    shutil.rmtree(tmp_path / "bases")
    with pytest.raises(DataLoss, match="cannot go on"):
        open_trainer(resume_step=1)


def test_weights_that_are_no_numbers_are_told_as_such(open_trainer: Open) -> None:
    trainer = run(open_trainer(), 1)
    with torch.no_grad():
        next(private_unet(trainer).parameters()).fill_(float("nan"))
    with pytest.raises(NonfiniteLoss):
        publish(trainer)


def test_averages_are_published_and_the_weights_go_on(open_trainer: Open) -> None:
    trainer = run(open_trainer(use_ema=True, ema_decay=0.5), 3)
    before = {name: p.clone() for name, p in trainer._parameters().items()}
    publish(trainer)
    assert all(torch.equal(before[name], p) for name, p in trainer._parameters().items())
    resumed = run(open_trainer(use_ema=True, ema_decay=0.5, resume_step=3), 2)
    run(trainer, 2)
    assert all(torch.equal(resumed._parameters()[name], p) for name, p in trainer._parameters().items())


@pytest.mark.parametrize(
    "knobs",
    [
        {"mixed_precision": "bf16", "gradient_checkpointing": True},
        {"class_prompt": "a plush octopus", "output_preservation_weight": 1.0},
        {"gradient_accumulation_steps": 2, "caption_dropout": 0.5, "train_text_encoder": True},
    ],
)
def test_the_knobs_are_for_a_private_unet_too(open_trainer: Open, knobs: dict[str, Any]) -> None:
    trainer = run(open_trainer(**knobs), 2)
    assert 0 < publish(trainer) < 1
    resumed = run(open_trainer(resume_step=2, **knobs), 1)
    run(trainer, 1)
    assert all(torch.equal(resumed._parameters()[name], p) for name, p in trainer._parameters().items())
