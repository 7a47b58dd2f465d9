"""Pictures: sizes, buckets, crops, masks."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from atelier_server.core import Recipe
from atelier_server.diffusion.conditioning import Framing
from atelier_server.raster import Raster
from atelier_server.training.pictures import (
    CROPS,
    bucket_sizes,
    crops,
    fresh_crop,
    nearest_size,
)

RECIPE = Recipe(instance_prompt="otto", resolution=16)
SQUARE = (16, 16)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(16, 16), (100, 16), (16, 100), (5, 7), (3, 300), (1, 1)])
@pytest.mark.parametrize("random_crop", [False, True])
def test_every_size_becomes_a_square_in_minus_one_to_one(size: tuple[int, int], random_crop: bool) -> None:
    recipe = replace(RECIPE, random_crop=random_crop)
    squares = crops(Raster(Image.new("RGB", size, "white")), SQUARE, recipe, generator())
    assert all(square.pixels.shape == (3, 16, 16) for square in squares)
    assert all((square.pixels == 1).all() for square in squares)
    assert len(squares) == (CROPS if random_crop and size[0] != size[1] else 1)


def test_the_centre_is_cropped_and_mirrored() -> None:
    image = Image.new("RGB", (48, 16), "black")
    image.paste("white", (16, 0, 24, 16))
    squares = crops(Raster(image), SQUARE, replace(RECIPE, random_flip=True), generator())
    centre, mirrored = (square.pixels for square in squares)
    assert (centre[..., :8] == 1).all()
    assert (centre[..., 8:] == -1).all()
    assert torch.equal(mirrored, centre.flip(-1))


def test_a_crop_tells_how_it_was_cut() -> None:
    """As diffusers' SDXL training scripts do: sizes before scaling, corners after it, mirrored first."""
    image = Image.new("RGB", (96, 32), "black")
    plain, mirrored = crops(Raster(image), SQUARE, replace(RECIPE, random_flip=True), generator())
    assert plain.framing == mirrored.framing == Framing((32, 96), (0, 16), (16, 16))
    recipe = replace(RECIPE, random_flip=True, random_crop=True)
    pairs = crops(Raster(image), SQUARE, recipe, generator())
    for cut, turned in zip(pairs[::2], pairs[1::2], strict=True):
        assert cut.framing.corner[1] + turned.framing.corner[1] == 48 - 16
    assert len({square.framing.corner for square in pairs}) > 2


def test_random_crops_follow_the_generator() -> None:
    picture = noise(64, 16)
    recipe = replace(RECIPE, random_crop=True)
    first, again, other = (
        torch.stack([square.pixels for square in crops(picture, SQUARE, recipe, generator(s))])
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_fresh_crops_are_any_and_either_side() -> None:
    """The pieces that one may draw are those of the picture, at any corner and mirrored or not."""
    picture, recipe = noise(20, 16), replace(RECIPE, random_crop=True, random_flip=True)
    chance = generator()
    drawn = [fresh_crop(picture, SQUARE, recipe, chance) for _ in range(60)]
    whole = torch.from_numpy(np.asarray(picture.image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1.0
    seen = set()
    for crop in drawn:
        left = crop.framing.corner[1]
        straight = torch.equal(crop.pixels, whole[..., left : left + 16])
        assert straight or torch.equal(crop.pixels, whole.flip(-1)[..., left : left + 16])
        seen.add((left, straight))
    assert seen == {(left, straight) for left in range(5) for straight in (True, False)}
    still = fresh_crop(picture, SQUARE, RECIPE, chance)
    assert torch.equal(still.pixels, crops(picture, SQUARE, RECIPE, chance)[0].pixels)


def test_the_mask_is_cut_like_the_picture() -> None:
    """Opaque where the picture is red: every crop's mask is its redness."""
    image = Image.new("RGBA", (48, 16), (255, 255, 255, 0))
    image.paste((255, 0, 0, 255), (16, 0, 24, 16))
    recipe = replace(RECIPE, masked_loss=True, random_crop=True, random_flip=True)
    for crop in crops(Raster.of(image), SQUARE, recipe, generator()):
        assert crop.mask is not None
        assert torch.equal(crop.mask, (1 - crop.pixels[1]) / 2)  # green: 1 on white, -1 on red
        latent = crop.latent_mask(4)
        assert latent is not None
        means = crop.mask.reshape(4, 4, 4, 4).mean((1, 3))
        assert torch.allclose(latent, means[None])
    (opaque,) = crops(noise(16, 16), SQUARE, replace(RECIPE, masked_loss=True), generator())
    assert opaque.mask is not None
    assert (opaque.mask == 1).all()
    (plain,) = crops(Raster.of(image), SQUARE, RECIPE, generator())
    assert plain.mask is None
    assert plain.latent_mask(4) is None


@given(resolution=st.integers(1, 64), step=st.sampled_from([8, 16, 32, 64]))
def test_buckets_have_about_the_area(resolution: int, step: int) -> None:
    resolution *= 16
    sizes = bucket_sizes(resolution, step)
    assert (resolution, resolution) in sizes
    for width, height in sizes:
        assert width * height <= resolution**2
        assert (height, width) in sizes
        assert max(width / height, height / width) <= 4
        if width != height:
            assert width % step == height % step == 0


def test_sdxls_buckets() -> None:
    """Those of its report (arXiv 2307.01952, appendix I) that are no wider than 1 to 4 and fit the area."""
    sizes = bucket_sizes(1024, 64)
    for size in [(1024, 1024), (896, 1152), (832, 1216), (768, 1344), (704, 1472), (640, 1600), (512, 2048)]:
        assert size in sizes


@given(width=st.integers(1, 4000), height=st.integers(1, 4000))
def test_a_picture_goes_to_the_nearest_ratio(width: int, height: int) -> None:
    sizes = bucket_sizes(512, 64)
    chosen = nearest_size((width, height), sizes)
    distances = {size: abs(math.log(size[0] / size[1]) - math.log(width / height)) for size in sizes}
    assert distances[chosen] == min(distances.values())


def test_a_picture_keeps_its_shape_in_its_bucket() -> None:
    sizes = bucket_sizes(64, 16)
    picture = noise(120, 60)
    size = nearest_size(picture.image.size, sizes)
    (crop,) = crops(picture, size, RECIPE, generator())
    assert size == (80, 48)
    assert crop.pixels.shape == (3, 48, 80)
    assert crop.framing == Framing((60, 120), (0, 8), (48, 80))
    cut = picture.image.resize((96, 48), Image.Resampling.LANCZOS).crop((8, 0, 88, 48))
    assert np.abs((crop.pixels.permute(1, 2, 0).numpy() + 1) * 127.5 - np.asarray(cut)).max() < 1e-3


def noise(width: int, height: int) -> Raster:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Raster(Image.fromarray(values))
