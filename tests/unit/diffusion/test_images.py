"""Pictures as files: exact pixels, and what made them inside."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from atelier_server.core import ImageFormat
from atelier_server.diffusion.images import decode_guide, decode_mask, decode_picture, encode_picture

PARAMETERS = {"prompt": "ein Tintenfisch, 墨", "seed": 3}


def test_png_keeps_every_pixel_and_the_parameters() -> None:
    pixels = torch.rand(3, 8, 16, generator=torch.Generator().manual_seed(0))
    data = encode_picture(pixels, ImageFormat.PNG, PARAMETERS)
    image = Image.open(io.BytesIO(data))
    expected = (pixels.permute(1, 2, 0).numpy() * 255).round().astype("uint8")
    assert np.array_equal(np.asarray(image), expected)
    assert json.loads(image.info["atelier"]) == PARAMETERS
    assert data == encode_picture(pixels, ImageFormat.PNG, PARAMETERS)


@pytest.mark.parametrize("image_format", [ImageFormat.JPEG, ImageFormat.WEBP])
def test_lossy_formats_carry_the_parameters_too(image_format: ImageFormat) -> None:
    image = Image.open(io.BytesIO(encode_picture(torch.full((3, 16, 16), 0.5), image_format, PARAMETERS)))
    assert image.get_format_mimetype() == image_format.mime_type
    assert json.loads(image.getexif()[ExifTags.Base.ImageDescription]) == PARAMETERS


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_sixteen_bits_of_grey_are_not_white() -> None:
    grey = png(Image.fromarray(np.array([[0x0000, 0x4000, 0x8000, 0xFFFF]], dtype=np.uint16)))
    expected = torch.tensor([0, 0x40, 0x80, 0xFF]) / 255
    for decode in (decode_picture, decode_guide):
        assert torch.equal(decode(grey), expected.expand(3, 1, 4))
    assert decode_mask(grey).tolist() == [[[0, 0, 1, 1]]]


def test_what_is_transparent_is_white_says_nothing_or_stays() -> None:
    """In a picture, in one that guides, in a mask."""
    half = Image.new("RGBA", (2, 1), (255, 255, 255, 0))
    half.putpixel((0, 0), (255, 255, 255, 255))
    clear = png(Image.new("RGBA", (2, 1), (9, 9, 9, 0)))
    assert torch.equal(decode_picture(clear), torch.ones(3, 1, 2))
    assert torch.equal(decode_guide(clear), torch.zeros(3, 1, 2))
    assert decode_mask(png(half)).tolist() == [[[1, 0]]]
