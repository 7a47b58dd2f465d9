"""Pictures and masks for image-to-image and inpainting."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def png(pixels: np.ndarray) -> bytes:
    """[H, W, 3] or [H, W], 0 to 255."""
    stream = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def soft_colours(width: int = 64, height: int = 64) -> bytes:
    y, x = np.mgrid[:height, :width] / 64
    return png(255 * np.stack([x, y, (np.sin(9 * x) + 1) / 2], axis=-1))


def right_part(width: int = 64, height: int = 64) -> bytes:
    """A mask: a little more than the right half is white, except for a strip below."""
    y, x = np.mgrid[:height, :width] / 64
    return png(255 * ((x > 0.45) & (y < 0.8)))
