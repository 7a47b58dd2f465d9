"""The pictures of a training: what is encoded when, what is held out, which ones cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from atelier_server.core import Recipe, TrainingImage, TrainingJob
from atelier_server.diffusion.base import BaseModel
from atelier_server.errors import InvalidRequest
from atelier_server.training.dataset import CachedExample, Dataset, FreshExample, held_out

RECIPE = Recipe(instance_prompt="otto", resolution=32)
Resident = tuple[BaseModel, object]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def job(images: list[TrainingImage], **changes: Any) -> TrainingJob:
    return TrainingJob("otto-1", "otto", 1, replace(RECIPE, **changes), tuple(images))


def filled(base: BaseModel, training: TrainingJob, seed: int = 0) -> Dataset:
    dataset = Dataset()
    for _ in dataset.fill(training, base, generator(seed)):
        pass
    return dataset


def test_filling_yields_between_pieces_of_device_work(
    resident: Resident, pictures: list[TrainingImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = resident
    calls: list[str] = []
    encode_image = base.encode_image
    monkeypatch.setattr(base, "encode_image", lambda pixels: calls.append("image") or encode_image(pixels))
    dataset = Dataset()
    training = job(pictures, random_flip=True, caption_dropout=0.1)
    seen = [len(calls) for _ in dataset.fill(training, base, generator())]
    assert seen == list(range(1, len(calls) + 1))
    assert len(calls) == 6
    assert dataset.captions(training.recipe) == ["otto", "otto in the snow", None]
    assert dataset.captions(RECIPE) == ["otto", "otto in the snow"]
    assert [example.caption for example in dataset.examples] == ["otto", "otto in the snow", "otto"]
    first, factor = dataset.examples[0], base.latent_scale
    assert isinstance(first, CachedExample)
    assert first.views[0].mean.shape == (base.latent_channels, 32 // factor, 32 // factor)


def test_without_a_cache_a_picture_is_encoded_when_it_is_drawn(
    resident: Resident, pictures: list[TrainingImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = resident
    cached = filled(base, job(pictures))
    calls: list[str] = []
    encode_image = base.encode_image
    monkeypatch.setattr(base, "encode_image", lambda pixels: calls.append("image") or encode_image(pixels))
    fresh = filled(base, job(pictures, cache_latents=False))
    assert calls == []
    assert list(fresh.tensors()) == []
    chance = generator()
    for own, other in zip(fresh.examples, cached.examples, strict=True):
        assert isinstance(own, FreshExample)
        assert (own.size, own.caption) == (other.size, other.caption)
        view, same = own.view(chance), other.view(chance)
        assert torch.equal(view.mean, same.mean)
        assert torch.equal(view.std, same.std)
        assert view.framing == same.framing
    assert calls == ["image"] * 3


def test_a_picture_that_is_gone_when_it_is_drawn_is_named(
    resident: Resident, pictures: list[TrainingImage]
) -> None:
    dataset = filled(resident[0], job(pictures, cache_latents=False))
    Path(pictures[1].path).unlink()
    with pytest.raises(InvalidRequest) as caught:
        dataset.examples[1].view(generator())
    assert caught.value.violations[0].field == "images[1]"


def test_pictures_keep_their_shape_in_buckets(resident: Resident, pictures: list[TrainingImage]) -> None:
    dataset = filled(resident[0], job(pictures, resolution=64, aspect_ratio_buckets=True))
    assert [example.size for example in dataset.examples] == [(64, 64), (80, 48), (32, 96)]
    factor = resident[0].latent_scale
    for example in dataset.examples:
        width, height = example.size
        assert example.view(generator()).mean.shape[1:] == (height // factor, width // factor)


def test_class_pictures_have_the_class_as_caption_and_every_size(
    resident: Resident, pictures: list[TrainingImage]
) -> None:
    training = job(
        pictures,
        resolution=64,
        aspect_ratio_buckets=True,
        with_prior_preservation=True,
        class_prompt="octopus",
    )
    shown = tuple((number, image.path) for number, image in enumerate(pictures))
    dataset = filled(resident[0], replace(training, class_images=tuple(reversed(shown))))
    assert sorted(dataset.class_examples) == sorted(example.size for example in dataset.examples)
    for size, examples in dataset.class_examples.items():
        assert [(example.size, example.caption) for example in examples] == [(size, "octopus")] * 3
    # In the order of their numbers.
    square = dataset.class_examples[64, 64][0].view(generator())
    assert torch.equal(square.mean, dataset.examples[0].view(generator()).mean)
    assert dataset.captions(training.recipe) == ["octopus", "otto", "otto in the snow"]


def test_held_out_pictures_are_in_no_step(resident: Resident, pictures: list[TrainingImage]) -> None:
    dataset = filled(resident[0], job(pictures, validation_split=0.4, random_flip=True))
    assert (len(dataset.examples), len(dataset.held_out)) == (2, 1)
    (held,) = dataset.held_out
    assert isinstance(held, CachedExample)
    assert len(held.views) == 1  # as it is


@pytest.mark.parametrize(
    ("split", "count", "held"), [(0.0, 5, 0), (0.01, 5, 1), (0.4, 5, 2), (0.99, 5, 4), (0.5, 2, 1)]
)
def test_at_least_one_is_held_out_and_one_stays(split: float, count: int, held: int) -> None:
    recipe = replace(RECIPE, validation_split=split)
    chosen = held_out(count, recipe)
    assert len(chosen) == held
    assert chosen == held_out(count, recipe)
    assert chosen <= set(range(count))


def test_seeds_hold_out_others() -> None:
    assert len({held_out(20, replace(RECIPE, validation_split=0.2, seed=seed)) for seed in range(5)}) > 1


def test_a_single_picture_cannot_be_held_out() -> None:
    with pytest.raises(InvalidRequest, match="single picture") as caught:
        held_out(1, replace(RECIPE, validation_split=0.5))
    assert caught.value.violations[0].field == "recipe.validation_split"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n broken"])
@pytest.mark.parametrize("cache_latents", [True, False])
def test_a_broken_picture_is_named(
    content: bytes, cache_latents: bool, tmp_path: Path, picture: Callable[..., Path], resident: Resident
) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    images = [
        TrainingImage(str(picture("x.png", (16, 16))), ""),
        TrainingImage(str(tmp_path / "bad.png"), ""),
    ]
    with pytest.raises(InvalidRequest) as caught:
        filled(resident[0], job(images, cache_latents=cache_latents))
    assert caught.value.violations[0].field == "images[1]"


def test_a_truncated_picture_is_refused(
    tmp_path: Path, picture: Callable[..., Path], resident: Resident
) -> None:
    whole = picture("x.png", (64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidRequest):
        filled(resident[0], job([TrainingImage(str(tmp_path / "half.png"), "")]))
