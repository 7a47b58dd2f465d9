"""How close a picture is to a subject's held-out pictures, by the colours in its middle.

Needs no model, so it cannot share a model's blind spots; it knows colours only, not shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 64  # pixels; larger pictures are averaged down first
_LEVELS = 6  # a channel


def color_histogram(picture: Image.Image) -> NDArray[np.float64]:
    """Shares of 6 x 6 x 6 colours, the middle of the picture counting most: [216], sums to 1.

    A pixel between two levels counts for both in proportion, so a slight change of tone changes little.
    """
    small = picture.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.BOX)
    place = np.asarray(small, np.float64).reshape(-1, 3) / 255 * (_LEVELS - 1)
    low = np.minimum(place.astype(np.int64), _LEVELS - 2)
    share = place - low
    histogram = np.zeros((_LEVELS,) * 3)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=1) * _MIDDLE
        np.add.at(histogram, tuple((low + corner).T), weight)
    return np.asarray(histogram.ravel() / histogram.sum())


def similarity(picture: Image.Image, references: Sequence[Image.Image]) -> float:
    """Overlap (0..1) of the picture's colours with the mean of the references' colours."""
    reference = np.mean([color_histogram(image) for image in references], axis=0)
    return float(np.minimum(color_histogram(picture), reference).sum())


def held_out(folder: Path) -> list[Image.Image]:
    """The pictures of an examples folder, by name."""
    return [Image.open(path).convert("RGB") for path in sorted(folder.glob("*.png"))]


def _middle() -> NDArray[np.float64]:
    """The weight of each pixel: a bell a little below the centre, where subjects stand."""
    y, x = np.mgrid[0:_SIDE, 0:_SIDE] / _SIDE
    return np.asarray(np.exp(-((x - 0.5) ** 2 + (y - 0.57) ** 2) / (2 * 0.18**2))).ravel()


_MIDDLE = _middle()
