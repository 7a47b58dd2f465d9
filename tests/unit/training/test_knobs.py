"""Knobs in a whole training: exact resuming, the validation loss, precisions, what they leave alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from atelier_server.core import TrainingImage
from atelier_server.errors import InvalidRequest
from atelier_server.training.company import micro_step
from atelier_server.training.trainer import Trainer
from tests.unit.training.conftest import Studio
from tests.unit.training.test_trainer import same_bits, steps

COMBINATIONS: dict[str, dict[str, Any]] = {
    "buckets, anew, averaged": {
        "aspect_ratio_buckets": True,
        "cache_latents": False,
        "random_crop": True,
        "random_flip": True,
        "repeats": 2,
        "use_ema": True,
        "noise_offset": 0.1,
        "gradient_accumulation_steps": 2,
    },
    "class, kept output, scaled": {
        "with_prior_preservation": True,
        "class_prompt": "an octopus",
        "output_preservation_weight": 0.5,
        "masked_loss": True,
        "train_batch_size": 1,  # float16 is slow on a CPU
        "mixed_precision": "fp16",
        "random_crop": True,
    },
    "prodigy, bf16, held out": {
        "optimizer": "prodigy",
        "learning_rate": 1.0,
        "mixed_precision": "bf16",
        "validation_split": 0.4,
        "cache_text_embeddings": False,
    },
}


@pytest.fixture
def classed(studio: Studio) -> Studio:
    """With three class pictures, should they be wanted."""
    of_class = tuple((number, image.path) for number, image in enumerate(studio.job.images))
    return replace(studio, job=replace(studio.job, class_images=of_class))


@pytest.mark.parametrize("name", COMBINATIONS)
def test_a_resumed_training_ends_with_the_same_bits(classed: Studio, name: str) -> None:
    changes = COMBINATIONS[name]
    straight = classed.trainer(version=1, **changes)
    curve = steps(straight, 2)
    straight.publish()
    curve += steps(straight, 2)
    first = classed.trainer(version=2, **changes)
    assert steps(first, 2) == curve[:2]
    first.publish()
    steps(first, 1)  # lost
    second = classed.trainer(version=2, resume_step=2, **changes)
    assert steps(second, 2) == curve[2:]
    assert same_bits(second.adapter(), straight.adapter())
    ours, theirs = straight.publish(), second.publish()
    assert (ours.sha256, ours.loss) == (theirs.sha256, theirs.loss)
    assert ours.validation_loss == theirs.validation_loss
    assert (ours.validation_loss is not None) == ("validation_split" in changes)


def test_the_validation_loss_draws_nothing_and_tells_what_was_learned(studio: Studio) -> None:
    """The steps are those of the same pictures without it, and a checkpoint's loss is the same whenever."""
    often, seldom = (studio.trainer(version=v, validation_split=0.4, learning_rate=5e-3) for v in (1, 2))
    before = often._rows.validation_loss(2, hears=False)
    curve = []
    for _ in range(8):
        curve += steps(often, 1)
        last = often.publish().validation_loss
    assert steps(seldom, 8) == curve
    assert seldom.publish().validation_loss == last
    assert before is not None
    assert last is not None
    assert last != before


def test_fp16_and_bf16_are_near_fp32(studio: Studio) -> None:
    """Losses of four steps; nothing that learns is in half precision."""
    curves = {name: steps(studio.trainer(mixed_precision=name), 4) for name in ("", "no", "fp16", "bf16")}
    assert curves["no"] == curves[""]
    for name, error in (("fp16", 5e-3), ("bf16", 3e-2)):
        assert curves[name] != curves[""]
        assert curves[name] == pytest.approx(curves[""], rel=error)
    trainer = studio.trainer(mixed_precision="fp16")
    steps(trainer, 1)
    assert {p.dtype for p in trainer._parameters().values()} == {torch.float32}
    assert {p.dtype for p in studio.base.unet.parameters()} == {torch.float32}


def test_precisions_do_not_share_a_forward(studio: Studio) -> None:
    kinds = {
        studio.trainer(batch_bucket=4, mixed_precision=name).company for name in ("", "no", "fp16", "bf16")
    }
    assert len(kinds) == 3
    assert studio.trainer(batch_bucket=4, aspect_ratio_buckets=True).company is None


def test_in_company_a_scaled_training_is_itself(studio: Studio) -> None:
    """Each one's scale is its own: beside one that learns otherwise the bits are the same."""
    changes: dict[str, Any] = {"batch_bucket": 8, "mixed_precision": "fp16"}
    alone, shared = (studio.trainer(version=version, **changes) for version in (1, 2))
    other = studio.trainer(rank=7, seed=9, use_ema=True, **changes)
    for _ in range(2):
        micro_step([alone])
        assert not any(isinstance(outcome, Exception) for outcome in micro_step([other, shared]))
    assert same_bits(alone.adapter(), shared.adapter())


def test_the_average_is_published_and_the_weights_go_on(studio: Studio) -> None:
    plain = studio.trainer(version=1)
    averaged = studio.trainer(version=2, use_ema=True, ema_decay=0.5)
    assert steps(plain, 5) == steps(averaged, 5)
    assert not same_bits(plain.adapter(), averaged.adapter())
    averaged.publish()
    assert steps(plain, 2) == steps(averaged, 2)


def test_transparent_pictures_teach_what_is_opaque(studio: Studio) -> None:
    """Where nothing is opaque there is nothing to learn."""
    glass = []
    for image in studio.job.images:
        with Image.open(image.path) as file:
            clear = file.convert("RGBA")
        clear.putalpha(0)
        path = image.path.replace(".png", "-clear.png")
        clear.save(path)
        glass.append(TrainingImage(path, ""))
    clear_studio = replace(studio, job=replace(studio.job, images=tuple(glass)))
    assert steps(clear_studio.trainer(masked_loss=True), 2) == [0.0, 0.0]
    assert min(steps(clear_studio.trainer(), 2)) > 0
    assert steps(studio.trainer(masked_loss=True), 2) == steps(studio.trainer(), 2)  # opaque throughout


def test_a_draw_that_fails_has_drawn_nothing(studio: Studio, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory while a picture is encoded: the same step is made when it is tried again."""
    knobs: dict[str, Any] = {"cache_latents": False, "random_flip": True}
    straight, disturbed = (studio.trainer(version=version, **knobs) for version in (1, 2))
    curve = steps(straight, 3)
    assert steps(disturbed, 1) == curve[:1]
    encode, calls = studio.base.encode_image, 0

    def crowded(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return encode(pixels)

    with monkeypatch.context() as patch:
        patch.setattr(studio.base, "encode_image", crowded)
        with pytest.raises(MemoryError):
            disturbed.begin()
    assert steps(disturbed, 2) == curve[1:]


def test_class_rows_and_kept_rows_are_counted(classed: Studio) -> None:
    knobs: dict[str, Any] = {"class_prompt": "an octopus"}
    counts = [
        classed.trainer(**knobs).rows,
        classed.trainer(**knobs, with_prior_preservation=True).rows,
        classed.trainer(**knobs, output_preservation_weight=1.0).rows,
        classed.trainer(**knobs, with_prior_preservation=True, output_preservation_weight=1.0).rows,
    ]
    assert counts == [2, 4, 4, 6]


def test_output_preservation_keeps_the_class(studio: Studio) -> None:
    """After the same steps the class is nearer to the base's answer than without."""

    def drift(trainer: Trainer) -> float:
        steps(trainer, 8)
        trainer._drawn = None
        with torch.no_grad():
            batch = trainer._rows.draw(torch.Generator().manual_seed(77))
        measured = trainer._rows.micro_batch(batch, bucket=trainer.bucket, hears=False)
        with torch.no_grad(), studio.bank.train(trainer._method.leaves):
            answer = studio.denoiser.predict(measured.noisy, measured.timesteps, measured.conditioning)
        kept = measured.loss.args[1]  # type: ignore[attr-defined]
        return float((answer[-len(kept) :] - kept).square().mean())

    knobs: dict[str, Any] = {"class_prompt": "an octopus", "learning_rate": 5e-3}
    weak, strong = (
        drift(studio.trainer(**knobs, output_preservation_weight=weight)) for weight in (1e-9, 3.0)
    )
    assert strong < 0.7 * weak


WORDS: dict[str, Any] = {"placeholder_tokens": ("<sks>",), "initializer_token": "octopus"}
METHODS: dict[str, dict[str, Any]] = {
    "text encoders": {"train_text_encoder": True},
    "textual_inversion": {"method": "textual_inversion", **WORDS},
    "pivotal": {"method": "pivotal", "train_text_encoder_ti_frac": 0.5, **WORDS},
    "dreambooth": {"method": "dreambooth", "train_text_encoder": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "pivotal" else pytest.mark.soak) for name in METHODS]
)
def test_every_method_has_them(classed: Studio, name: str) -> None:
    """All knobs at once, resumed in the midst: the same bits."""
    changes = {
        **METHODS[name],
        "instance_prompt": "<sks> octopus" if "placeholder_tokens" in METHODS[name] else "sks octopus",
        "class_prompt": "octopus",
        "with_prior_preservation": True,
        "output_preservation_weight": 0.5,
        "use_ema": True,
        "ema_decay": 0.5,
        "mixed_precision": "bf16",
        "validation_split": 0.3,
        "max_train_steps": 4,
        "train_batch_size": 1,
        "masked_loss": True,
        "noise_offset": 0.05,
    }
    straight = classed.trainer(version=1, **changes)
    curve = steps(straight, 4)
    first = classed.trainer(version=2, **changes)
    assert steps(first, 3) == curve[:3]
    for _ in first.publishing():
        pass
    told = first.publish().validation_loss
    assert told is not None
    assert told > 0
    second = classed.trainer(version=2, resume_step=3, **changes)
    assert steps(second, 1) == curve[3:]
    ours, theirs = straight.adapter(), second.adapter()
    assert same_bits(ours, theirs)
    assert ours.tokens.keys() == theirs.tokens.keys()
    assert bool(ours.tokens) == ("placeholder_tokens" in METHODS[name])
    for trainer in (straight, second):
        assert {p.dtype for p in trainer._parameters().values()} == {torch.float32}


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("recipe.optimizer", {"optimizer": "adamw8bit"}),
        ("recipe.validation_split", {"validation_split": 0.5}),
    ],
)
def test_what_cannot_be_is_named(studio: Studio, field: str, changes: dict[str, Any]) -> None:
    single = replace(studio, job=replace(studio.job, images=studio.job.images[:1]))
    with pytest.raises(InvalidRequest) as caught:
        single.trainer(**changes)
    assert caught.value.violations[0].field == field
