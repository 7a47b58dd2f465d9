"""Pictures: orientation, transparency, sizes, crops, order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from atelier_server.core import Recipe, TrainingImage
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import Framing
from atelier_server.errors import InvalidRequest
from atelier_server.training.dataset import CROPS, Batch, Dataset, Example, Order, View, crops, upright

RECIPE = Recipe(instance_prompt="otto", resolution=16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as file:
        turned = upright(file)
    assert turned.size == (10, 20)
    assert turned.getpixel((5, 0)) == (0, 0, 255)
    assert turned.getpixel((5, 19)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "P":
        image = image.quantize()
    flat = upright(image.convert(mode))
    assert flat.mode == "RGB"
    assert flat.getpixel((0, 0)) == (0, 0, 0)
    assert flat.getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    else:
        image = Image.new("L", (4, 4), 200).convert(mode)
    grey = upright(image)
    assert grey.mode == "RGB"
    red, green, blue = np.asarray(grey).reshape(-1, 3)[0]
    assert red == green == blue
    assert mode != "I;16" or red == 0x80


@pytest.mark.parametrize("size", [(16, 16), (100, 16), (16, 100), (5, 7), (3, 300), (1, 1)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_every_size_becomes_a_square_in_minus_one_to_one(size: tuple[int, int], random_crop: bool) -> None:
    recipe = replace(RECIPE, random_crop=random_crop)
    squares = crops(Image.new("RGB", size, "white"), recipe, generator())
    assert all(square.pixels.shape == (3, 16, 16) for square in squares)
    assert all((square.pixels == 1).all() for square in squares)
    assert len(squares) == (CROPS if random_crop and size[0] != size[1] else 1)


def test_the_centre_is_cropped_and_mirrored() -> None:
    image = Image.new("RGB", (48, 16), "black")
    image.paste("white", (16, 0, 24, 16))
    squares = crops(image, replace(RECIPE, random_flip=True), generator())
    centre, mirrored = (square.pixels for square in squares)
    assert (centre[..., :8] == 1).all()
    assert (centre[..., 8:] == -1).all()
    assert torch.equal(mirrored, centre.flip(-1))


def test_a_crop_tells_how_it_was_cut() -> None:
    """As diffusers' SDXL training scripts do: sizes before scaling, corners after it, mirrored first."""
    image = Image.new("RGB", (96, 32), "black")
    plain, mirrored = crops(image, replace(RECIPE, random_flip=True), generator())
    assert plain.framing == mirrored.framing == Framing((32, 96), (0, 16), (16, 16))
    recipe = replace(RECIPE, random_flip=True, random_crop=True)
    pairs = crops(image, recipe, generator())
    for cut, turned in zip(pairs[::2], pairs[1::2], strict=True):
        assert cut.framing.corner[1] + turned.framing.corner[1] == 48 - 16
    assert len({square.framing.corner for square in pairs}) > 2


def test_random_crops_follow_the_generator() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 64, 3), dtype=np.uint8))
    recipe = replace(RECIPE, random_crop=True)
    first, again, other = (
        torch.stack([square.pixels for square in crops(image, recipe, generator(s))]) for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_every_epoch_has_every_picture_once() -> None:
    order, chance = Order([], 0), generator()
    taken = [index for _ in range(15) for index in order.take(4, 5, chance)]
    epochs = [taken[begin : begin + 5] for begin in range(0, 60, 5)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_the_posterior_is_sampled_anew_every_time() -> None:
    view = View(torch.full((4, 2, 2), 3.0), torch.full((4, 2, 2), 0.5), Framing.whole(16, 16))
    examples, chance = [Example((view,), "otto")] * 500, generator()
    draw = {"caption_dropout": 0.25, "num_train_timesteps": 1000, "generator": chance}
    batch = Batch.draw(examples, **draw)
    assert batch.latents.mean() == pytest.approx(3.0, abs=0.05)
    assert batch.latents.std() == pytest.approx(0.5, abs=0.05)
    assert batch.noise.std() == pytest.approx(1.0, abs=0.05)
    assert 0 <= int(batch.timesteps.min()) < 20
    assert 980 < int(batch.timesteps.max()) < 1000
    assert set(batch.captions) == {"otto", None}
    assert batch.captions.count(None) / 500 == pytest.approx(0.25, abs=0.06)
    assert not torch.equal(batch.latents, Batch.draw(examples, **draw).latents)


def test_filling_yields_between_pieces_of_device_work(
    resident: tuple[BaseModel, object], pictures: list[TrainingImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, _ = resident
    calls: list[str] = []
    encode_image = base.encode_image
    monkeypatch.setattr(base, "encode_image", lambda pixels: calls.append("image") or encode_image(pixels))
    dataset = Dataset()
    recipe = replace(RECIPE, resolution=32, random_flip=True, caption_dropout=0.1)
    seen = [len(calls) for _ in dataset.fill(pictures, recipe, base, generator())]
    assert seen == list(range(1, len(calls) + 1))
    assert len(calls) == 6
    assert dataset.captions(recipe) == ["otto", "otto in the snow", None]
    assert dataset.captions(RECIPE) == ["otto", "otto in the snow"]
    assert [example.caption for example in dataset.examples] == ["otto", "otto in the snow", "otto"]
    latents, factor = dataset.examples[0].views[0].mean, base.latent_scale
    assert latents.shape == (base.latent_channels, 32 // factor, 32 // factor)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n broken"])
def test_a_broken_picture_is_named(
    content: bytes, tmp_path: Path, picture: Callable[..., Path], resident: tuple[BaseModel, object]
) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    images = [
        TrainingImage(str(picture("x.png", (16, 16))), ""),
        TrainingImage(str(tmp_path / "bad.png"), ""),
    ]
    with pytest.raises(InvalidRequest) as caught:
        list(Dataset().fill(images, replace(RECIPE, resolution=32), resident[0], generator()))
    assert caught.value.violations[0].field == "images[1]"


def test_a_truncated_picture_is_refused(
    tmp_path: Path, picture: Callable[..., Path], resident: tuple[BaseModel, object]
) -> None:
    whole = picture("x.png", (64, 64)).read_bytes()
    (tmp_path / "half.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidRequest):
        list(
            Dataset().fill([TrainingImage(str(tmp_path / "half.png"), "")], RECIPE, resident[0], generator())
        )
