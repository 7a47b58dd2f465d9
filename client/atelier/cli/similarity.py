"""How much the colours of a subject agree between two pictures.

Measure: the central 70 % of a picture (each side), scaled to 64 x 64, in HSV; pixels with saturation and
value of at least a quarter count as the subject's; their histogram over 16 hues x 3 saturations x 3 values,
each pixel shared between the two nearest hues; histogram intersection (Swain and Ballard, "Color indexing",
1991): 1 for equal histograms, 0 for disjoint ones or a picture without saturated pixels.

A measure of colours only: it says nothing about shape.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from statistics import fmean

from PIL import Image

SIDE = 64
CENTRE = 0.7
HUES, LEVELS = 16, 3
THRESHOLD = 64

Histogram = tuple[float, ...]


def histogram(data: bytes) -> Histogram:
    """Of the subject's colours in a picture file; sums to 1, or to 0 if nothing is saturated."""
    with Image.open(io.BytesIO(data)) as picture:
        rgb = picture.convert("RGB")
    dx, dy = (round(side * (1 - CENTRE) / 2) for side in rgb.size)
    centre = rgb.crop((dx, dy, rgb.width - dx, rgb.height - dy)).resize((SIDE, SIDE), Image.Resampling.BOX)
    pixels = centre.convert("HSV").tobytes()
    bins = [0.0] * (HUES * LEVELS * LEVELS)
    span = 256 - THRESHOLD
    for hue, saturation, value in zip(pixels[::3], pixels[1::3], pixels[2::3], strict=True):
        if saturation >= THRESHOLD and value >= THRESHOLD:
            cell = (saturation - THRESHOLD) * LEVELS // span * LEVELS + (value - THRESHOLD) * LEVELS // span
            position = hue * HUES / 256
            share = position - int(position)
            for neighbour, weight in ((int(position), 1 - share), (int(position) + 1, share)):
                bins[neighbour % HUES * LEVELS * LEVELS + cell] += weight
    total = sum(bins)
    return tuple(amount / total for amount in bins) if total else tuple(bins)


def intersection(one: Histogram, other: Histogram) -> float:
    """0 to 1."""
    return sum(map(min, one, other))


def similarity(pictures: Sequence[bytes], references: Sequence[bytes]) -> float:
    """Mean over all pairs of a picture and a reference, 0 to 1. Both need at least one picture."""
    kept = [histogram(data) for data in references]
    return fmean(intersection(histogram(data), reference) for data in pictures for reference in kept)
