"""Pictures as files: exact pixels, and what made them inside."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from atelier_server.core import ImageFormat
from atelier_server.diffusion.images import encode_picture

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
