"""One training: resuming to the same bits, checkpoints, bad recipes, and what it leaves alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.stored import decode_stored
from atelier_server.core import CheckpointId
from atelier_server.errors import DataLoss, InvalidRequest, NonfiniteLoss, StorageFull
from atelier_server.training.trainer import Trainer
from tests.unit.training.conftest import Studio

RICH: dict[str, Any] = {
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 2,
    "random_crop": True,
    "random_flip": True,
    "caption_dropout": 0.3,
    "snr_gamma": 5.0,
}


def steps(trainer: Trainer, count: int) -> list[float]:
    return [trainer.train_step().loss for _ in range(count)]


def same_bits(a: CanonicalAdapter, b: CanonicalAdapter) -> bool:
    return a.low_rank.keys() == b.low_rank.keys() and all(
        torch.equal(a.low_rank[n].A, b.low_rank[n].A) and torch.equal(a.low_rank[n].B, b.low_rank[n].B)
        for n in a.low_rank
    )


@pytest.mark.parametrize("changes", [{}, RICH], ids=["plain", "rich"])
def test_a_resumed_training_ends_with_the_same_bits(studio: Studio, changes: dict[str, Any]) -> None:
    straight = studio.trainer(version=1, **changes)
    curve = steps(straight, 4)
    straight.publish()
    curve += steps(straight, 4)
    first = studio.trainer(version=2, **changes)
    assert steps(first, 4) == curve[:4]
    first.publish()
    steps(first, 1)  # lost
    torch.manual_seed(99)  # nothing depends on the global state
    second = studio.trainer(version=2, resume_step=4, **changes)
    assert second.step == 4
    assert second.published == studio.store.last_checkpoint("otto", 2)
    assert steps(second, 4) == curve[4:]
    assert same_bits(second.adapter(), straight.adapter())
    ours, theirs = straight.publish(), second.publish()
    assert (ours.sha256, ours.loss) == (theirs.sha256, theirs.loss)


def test_a_checkpoint_is_an_adapter_like_any_other(studio: Studio) -> None:
    trainer = studio.trainer()
    losses = steps(trainer, 2)
    record = trainer.publish()
    assert record.id == CheckpointId("otto", 1, 2)
    assert record.loss == pytest.approx(sum(losses) / 2)
    assert (record.rank, record.lora_alpha) == (4, 8.0)
    adapter = decode_stored(Path(record.path).read_bytes())
    assert same_bits(adapter, trainer.adapter())
    assert {module.alpha for module in adapter.low_rank.values()} == {8.0}
    studio.bank.check(adapter)
    assert trainer.publish() is record  # nothing new to publish
    steps(trainer, 1)
    assert trainer.publish().id.step == 3
    assert not same_bits(decode_stored(Path(record.path).read_bytes()), trainer.adapter())


def test_its_state_is_weights_optimizer_and_caches(studio: Studio) -> None:
    trainer = studio.trainer()
    before = trainer.state_bytes()
    steps(trainer, 1)
    weights = sum(m.A.nbytes + m.B.nbytes for m in trainer.adapter().modules.values())
    moments = trainer.state_bytes() - before
    assert 2 * weights <= moments < 2.1 * weights  # two moments, and a counter a tensor
    assert before > weights


def test_it_learns(studio: Studio) -> None:
    """Against the same batches, noise and timesteps with a rate that learns nothing."""
    frozen = steps(studio.trainer(learning_rate=1e-12), 12)
    learning = steps(studio.trainer(learning_rate=5e-3), 12)
    assert learning[0] == frozen[0]
    assert sum(learning[-6:]) < 0.95 * sum(frozen[-6:])


def test_base_and_global_chance_are_untouched_and_serving_stays_in_evaluation_mode(studio: Studio) -> None:
    unet = studio.base.unet
    before = {name: weight.clone() for name, weight in unet.state_dict().items()}
    chance = torch.get_rng_state()
    trainer = studio.trainer(gradient_checkpointing=True)
    steps(trainer, 2)
    trainer.publish()
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(torch.equal(before[name], weight) for name, weight in unet.state_dict().items())
    assert not any(module.training for module in unet.modules())
    assert not unet.is_gradient_checkpointing
    assert all(p.grad is None and not p.requires_grad for p in unet.parameters())


def test_gradient_checkpointing_acts_in_this_trainings_steps_only(studio: Studio) -> None:
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    curves = []
    hook = studio.base.unet.mid_block.resnets[1].register_forward_pre_hook(count)
    try:
        for checkpointing, expected in ((False, 3), (True, 6)):
            trainer = studio.trainer(gradient_checkpointing=checkpointing)
            forwards = 0
            curves.append(steps(trainer, 3))
            assert forwards == expected
            forwards = 0
            other = studio.trainer(gradient_checkpointing=False)
            steps(other, 1)
            assert forwards == 1
    finally:
        hook.remove()
    assert curves[0] == curves[1]


def test_a_rate_that_blows_up_is_stopped_and_the_last_good_checkpoint_kept(studio: Studio) -> None:
    trainer = studio.trainer()
    steps(trainer, 1)
    trainer.publish()
    steps(trainer, 1)
    weights = trainer.adapter()
    with torch.no_grad():
        trainer._method.leaves.parameters()[1][0, 0] = float("inf")
    poisoned = trainer.adapter()
    with pytest.raises(NonfiniteLoss) as caught:
        trainer.train_step()
    assert caught.value.metadata == {"step": "3"}
    assert trainer.step == 2
    assert same_bits(trainer.adapter(), poisoned)  # the step wrote nothing
    with pytest.raises(NonfiniteLoss) as caught:
        trainer.publish()
    assert caught.value.metadata == {"step": "2"}
    last = studio.store.last_checkpoint("otto", 1)
    assert last is not None
    assert last.id.step == 1
    assert not same_bits(weights, poisoned)


def test_absurd_learning_rates_end_in_nonfinite_loss(studio: Studio) -> None:
    trainer = studio.trainer(learning_rate=1e30)
    with pytest.raises(NonfiniteLoss) as caught:
        steps(trainer, 12)
    assert int(caught.value.metadata["step"]) <= 4


def test_weights_that_are_finite_but_paint_nothing_are_not_published(studio: Studio) -> None:
    trainer = studio.trainer(learning_rate=1e20, lr_scheduler="constant_with_warmup", lr_warmup_steps=10)
    trainer.train_step()  # at a rate of 0
    trainer.publish()
    trainer.train_step()  # its own loss is that of the weights before it
    assert all(bool(m.A.isfinite().all()) for m in trainer.adapter().low_rank.values())
    with pytest.raises(NonfiniteLoss) as caught:
        trainer.publish()
    assert caught.value.metadata == {"step": "2"}
    last = studio.store.last_checkpoint("otto", 1)
    assert last is not None
    assert last.id.step == 1


def test_seeds_differ_and_repeat(studio: Studio) -> None:
    one, again, other = (steps(studio.trainer(seed=seed), 2) for seed in (1, 1, 2))
    assert one == again
    assert one != other


def test_a_full_disk_at_a_checkpoint_loses_nothing(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = studio.trainer()
    losses = steps(trainer, 2)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StorageFull):
            trainer.publish()
    assert studio.store.last_checkpoint("otto", 1) is None
    assert trainer.publish().loss == pytest.approx(sum(losses) / 2)


def test_a_damaged_checkpoint_is_data_loss(studio: Studio) -> None:
    trainer = studio.trainer()
    steps(trainer, 1)
    files = trainer.publish().files
    for name in ("training-state.safetensors", "training-state.json", "adapter.safetensors"):
        path = studio.store._blobs.path(files[name])
        whole = path.read_bytes()
        for content in (None, b"", b"{}", whole[:-1]):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(DataLoss):
                studio.trainer(resume_step=1)
            path.write_bytes(whole)
    assert studio.trainer(resume_step=1).step == 1


def test_another_batch_size_cannot_resume(studio: Studio) -> None:
    trainer = studio.trainer()
    steps(trainer, 1)
    trainer.publish()
    with pytest.raises(DataLoss, match="batches of 2"):
        studio.trainer(resume_step=1, train_batch_size=3)


def test_a_schedule_that_cannot_be_is_the_recipes_fault(studio: Studio) -> None:
    with pytest.raises(InvalidRequest, match="lr_scheduler"):
        studio.trainer(lr_scheduler="polynomial", learning_rate=1e-9)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_every_schedule_of_the_contract(studio: Studio, name: str) -> None:
    trainer = studio.trainer(lr_scheduler=name, lr_warmup_steps=2, max_train_steps=6)
    rates = [trainer.train_step().learning_rate for _ in range(6)]
    assert rates[0] == (1e-3 if name == "constant" else 0.0)
    assert rates[2] == pytest.approx(1e-3)
    assert rates[5] == pytest.approx(1e-3) if name.startswith("constant") else rates[5] < 1e-3
