"""Several trainings in one forward: nobody's bits depend on who else is in it, or on where."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atelier_server.diffusion.conditioning import Conditioning, Framing
from atelier_server.errors import NonfiniteLoss
from atelier_server.training.company import StepReport, micro_step
from atelier_server.training.trainer import Trainer
from tests.unit.training.conftest import Studio
from tests.unit.training.test_trainer import same_bits

BUCKET = 8
# What neighbours may differ in.
RECIPES: Sequence[dict[str, Any]] = (
    {"train_batch_size": 2, "rank": 4, "seed": 5},
    {"train_batch_size": 1, "rank": 16, "lora_alpha": 3.0, "seed": 6, "learning_rate": 5e-3},
    {"train_batch_size": 3, "rank": 5, "seed": 7, "snr_gamma": 5.0, "random_flip": True},
    {"train_batch_size": 2, "rank": 1, "seed": 8, "caption_dropout": 0.5, "gradient_accumulation_steps": 2},
)


def member(studio: Studio, number: int, **changes: Any) -> Trainer:
    trainer = studio.trainer(**{**RECIPES[number], **changes})
    trainer.settle(BUCKET)
    return trainer


def together(trainers: Sequence[Trainer], steps: int) -> list[list[float]]:
    """The losses of each."""
    curves: list[list[float]] = [[] for _ in trainers]
    for _ in range(steps):
        for curve, outcome in zip(curves, micro_step(trainers), strict=True):
            assert not isinstance(outcome, Exception)
            if outcome is not None:
                curve.append(outcome.loss)
    return curves


def paint(studio: Studio) -> None:
    """A picture's step, by the same U-Net."""
    base = studio.base
    text = base.encode_prompt("a red house")
    rows = Conditioning.stack([base.family.condition(text, Framing.whole(32, 32))] * 2)
    with torch.no_grad(), studio.bank.use(None):
        studio.denoiser.predict(torch.ones(2, *base.latent_shape(32, 32)), torch.full((2,), 500.0), rows)


@pytest.mark.parametrize(("checkpointing", "steps"), [(False, 3), (True, 2)])
def test_neighbours_places_and_pictures_between_change_no_bit(
    studio: Studio, checkpointing: bool, steps: int
) -> None:
    changes = {"gradient_checkpointing": checkpointing}
    alone = [member(studio, number, **changes) for number in range(4)]
    curves = [together([trainer], steps)[0] for trainer in alone]
    for order in ([0, 1, 2, 3], [3, 2, 0]):
        trainers = [member(studio, number, **changes) for number in order]
        for step in range(steps):
            for number, outcome in zip(order, micro_step(trainers), strict=True):
                assert outcome is None or isinstance(outcome, StepReport)
                if outcome is not None and number != 3:
                    assert outcome.loss == curves[number][step]
            paint(studio)
        for number, trainer in zip(order, trainers, strict=True):
            assert same_bits(trainer.adapter(), alone[number].adapter())


SCHEDULES = st.lists(st.permutations(range(4)).map(lambda p: p[: 1 + p[0]]), min_size=3, max_size=8)


@settings(max_examples=2, deadline=None)
@given(schedule=SCHEDULES)
def test_whoever_comes_and_goes(studio_of_a_session: Studio, schedule: list[list[int]]) -> None:
    come_and_go(studio_of_a_session, schedule)


@pytest.mark.soak
@settings(max_examples=30, deadline=None)
@given(schedule=SCHEDULES)
def test_whoever_comes_and_goes_often(studio_of_a_session: Studio, schedule: list[list[int]]) -> None:
    come_and_go(studio_of_a_session, schedule)


def come_and_go(studio: Studio, schedule: list[list[int]]) -> None:
    """At each micro-step another company: each training's bits are those of one that was always alone."""
    shared = [member(studio, number) for number in range(4)]
    for company in schedule:
        micro_step([shared[number] for number in company])
    for number, trainer in enumerate(shared):
        taken = sum(number in company for company in schedule)
        alone = member(studio, number)
        together([alone], taken)
        assert same_bits(trainer.adapter(), alone.adapter())
        assert trainer.step == alone.step


def test_one_that_blows_up_takes_nobody_along(studio: Studio) -> None:
    good, bad, alone = member(studio, 0), member(studio, 1, learning_rate=1e30), member(studio, 0)
    for _ in range(4):
        fine, broken = micro_step([good, bad])
        assert isinstance(fine, StepReport)
        if broken is None or isinstance(broken, StepReport):
            continue
        assert isinstance(broken, NonfiniteLoss)
        break
    else:
        pytest.fail("it did not blow up")
    together([alone], good.step)
    assert same_bits(good.adapter(), alone.adapter())


def test_a_step_that_runs_out_of_memory_is_taken_again_by_fewer(
    studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers, undisturbed = [member(studio, n) for n in (0, 3)], [member(studio, n) for n in (0, 3)]
    micro_step(trainers)  # the second is in the midst of an accumulation
    predict, tries = studio.denoiser.predict, iter([True])

    def full(*given: Any) -> torch.Tensor:
        if next(tries, False):
            raise torch.OutOfMemoryError("out of memory")
        return predict(*given)

    with monkeypatch.context() as patch:
        patch.setattr(studio.denoiser, "predict", full)
        with pytest.raises(torch.OutOfMemoryError):
            micro_step(trainers)
        for trainer in trainers:
            micro_step([trainer])
    together(undisturbed, 2)
    for one, other in zip(trainers, undisturbed, strict=True):
        assert one.step == other.step
        assert same_bits(one.adapter(), other.adapter())


def test_gradients_are_gathered_over_the_micro_steps_of_a_step(studio: Studio) -> None:
    """Two micro-steps of two rows each are a step of four."""
    halves = studio.trainer(train_batch_size=2, gradient_accumulation_steps=2, random_flip=False)
    halves.settle()
    assert micro_step([halves]) == [None]
    assert halves.step == 0
    (report,) = micro_step([halves])
    assert isinstance(report, StepReport)
    assert halves.step == 1
    # The same rows, drawn in the same order, all at once.
    whole = studio.trainer(train_batch_size=2)
    whole.settle(2)
    grads = []
    for _ in range(2):
        batch = whole.begin()
        with studio.bank.train(batch.leaves):
            loss = batch.loss(studio.denoiser.predict(batch.noisy, batch.timesteps, batch.conditioning))
            grads.append(torch.autograd.grad(loss, list(batch.parameters)))
        whole._drawn = None
    mean = [(one + two) / 2 for one, two in zip(*grads, strict=True)]
    whole.begin()
    assert isinstance(whole.finish(torch.zeros(()), mean), StepReport)
    for ours, theirs in zip(
        halves._method.leaves.parameters(), whole._method.leaves.parameters(), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-7)


def test_a_bucket_is_for_life_and_in_the_checkpoint(studio: Studio) -> None:
    trainer = member(studio, 0)
    trainer.settle(16)  # too late
    assert trainer.bucket == BUCKET
    together([trainer], 2)
    trainer.publish()
    resumed = studio.trainer(**RECIPES[0], resume_step=2)
    resumed.settle(16)
    assert resumed.bucket == BUCKET
    assert together([resumed], 2) == together([trainer], 2)
    assert same_bits(resumed.adapter(), trainer.adapter())


def test_who_may_share(studio: Studio) -> None:
    one, other = member(studio, 0), member(studio, 1)
    assert one.company == other.company is not None
    assert member(studio, 0, gradient_checkpointing=True).company != one.company
    assert member(studio, 0, resolution=64).company != one.company
    assert member(studio, 0, exact=True).company is None
    own = studio.trainer(**RECIPES[0], batch_bucket=2)
    assert (own.bucket, own.company) == (2, None)
    assert studio.trainer(**RECIPES[0], batch_bucket=16).bucket == 16
