"""Pictures of every mode and orientation become RGB of eight bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from atelier_server.raster import Raster


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10), "red")
    image.paste("blue", (0, 0, 10, 10))
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    image.save(tmp_path / "x.png", exif=exif)
    with Image.open(tmp_path / "x.png") as file:
        turned = Raster.of(file).image
    assert turned.size == (10, 20)
    assert turned.getpixel((5, 0)) == (0, 0, 255)
    assert turned.getpixel((5, 19)) == (255, 0, 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white(mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 2, 4))
    if mode == "P":
        image = image.quantize()
    picture = Raster.of(image.convert(mode))
    flat = picture.image
    assert flat.mode == "RGB"
    assert flat.getpixel((0, 0)) == (0, 0, 0)
    assert flat.getpixel((3, 3)) == (255, 255, 255)
    assert picture.opacity is not None
    assert [picture.opacity.getpixel((x, 0)) for x in (0, 3)] == [255, 0]


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "I;16"])
def test_other_modes_become_rgb(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((4, 4), 0x8000, dtype=np.uint16))
    else:
        image = Image.new("L", (4, 4), 200).convert(mode)
    grey = Raster.of(image).image
    assert grey.mode == "RGB"
    red, green, blue = np.asarray(grey).reshape(-1, 3)[0]
    assert red == green == blue
    assert mode != "I;16" or red == 0x80
