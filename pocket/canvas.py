"""A canvas in unit coordinates: drawings look the same at every size.

x runs right and y runs down, both over 0..1. Shapes are drawn `supersampling` times larger and averaged down
at the end, so edges are smooth. Colours are triples of 0..255 (alpha is always opaque).
"""

# ruff: noqa: PLR0917 - coordinates are positional in every drawing library.
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Color = tuple[float, float, float]
Point = tuple[float, float]

COLORS: dict[str, Color] = {
    "red": (215, 35, 35),
    "orange": (240, 130, 20),
    "yellow": (245, 210, 40),
    "green": (50, 165, 60),
    "blue": (40, 90, 220),
    "purple": (130, 55, 190),
    "pink": (245, 120, 180),
    "brown": (125, 75, 40),
    "white": (240, 240, 240),
    "black": (45, 45, 50),
    "gray": (140, 140, 145),
}


def mix(a: Color, b: Color, share: float) -> Color:
    """`a` with `share` (0..1) of `b`."""
    return (
        a[0] + (b[0] - a[0]) * share,
        a[1] + (b[1] - a[1]) * share,
        a[2] + (b[2] - a[2]) * share,
    )


def jitter(color: Color, rng: np.random.Generator, amount: float = 12.0) -> Color:
    """`color` with each channel moved by up to `amount`."""
    r, g, b = (float(np.clip(v + rng.uniform(-amount, amount), 0, 255)) for v in color)
    return (r, g, b)


def smooth_noise(rng: np.random.Generator, size: int, cells: int) -> NDArray[np.float32]:
    """Noise of standard deviation near 1 that varies over size/cells pixels: [size, size]."""
    coarse = rng.standard_normal((cells + 2, cells + 2)).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))


class Canvas:
    """A square picture under construction; `finish` gives it at its size."""

    def __init__(self, size: int, *, transparent: bool = False, supersampling: int = 2) -> None:
        self.size = size
        self._scale = size * supersampling
        mode, background = ("RGBA", (0, 0, 0, 0)) if transparent else ("RGB", (0, 0, 0))
        self._image = Image.new(mode, (self._scale, self._scale), background)
        self._draw = ImageDraw.Draw(self._image)

    def gradient(self, top: float, bottom: float, above: Color, below: Color) -> None:
        """Fills the rows from `top` to `bottom`, blending `above` into `below`."""
        first, last = round(top * self._scale), round(bottom * self._scale)
        rows = np.linspace(0.0, 1.0, max(last - first, 1), dtype=np.float32)[:, None, None]
        blend = np.asarray(above, np.float32) * (1 - rows) + np.asarray(below, np.float32) * rows
        band = np.broadcast_to(blend, (blend.shape[0], self._scale, 3)).astype(np.uint8)
        self._image.paste(Image.fromarray(band), (0, first))

    def ellipse(self, x: float, y: float, rx: float, ry: float, fill: Color) -> None:
        self._draw.ellipse(self._box(x - rx, y - ry, x + rx, y + ry), fill=_ints(fill))

    def chord(self, x: float, y: float, rx: float, ry: float, angles: Point, fill: Color) -> None:
        """The part of an ellipse cut off by the line between two angles (degrees, clockwise from right)."""
        self._draw.chord(self._box(x - rx, y - ry, x + rx, y + ry), *angles, fill=_ints(fill))

    def arc(self, x: float, y: float, rx: float, ry: float, angles: Point, width: float, fill: Color) -> None:
        box = self._box(x - rx, y - ry, x + rx, y + ry)
        self._draw.arc(box, *angles, fill=_ints(fill), width=self._width(width))

    def ring(self, x: float, y: float, radius: float, width: float, fill: Color) -> None:
        self.arc(x, y, radius, radius, (0, 360), width, fill)

    def rectangle(self, x0: float, y0: float, x1: float, y1: float, fill: Color, radius: float = 0.0) -> None:
        box, corner = self._box(x0, y0, x1, y1), radius * self._scale
        self._draw.rounded_rectangle(box, radius=corner, fill=_ints(fill))

    def polygon(self, points: Sequence[Point], fill: Color) -> None:
        self._draw.polygon([(x * self._scale, y * self._scale) for x, y in points], fill=_ints(fill))

    def line(self, points: Sequence[Point], width: float, fill: Color) -> None:
        """A line with round joints and ends."""
        scaled = [(x * self._scale, y * self._scale) for x, y in points]
        self._draw.line(scaled, fill=_ints(fill), width=self._width(width), joint="curve")
        for x, y in (points[0], points[-1]):
            self.ellipse(x, y, width / 2, width / 2, fill)

    def finish(self) -> Image.Image:
        """The picture at its size, RGB or, if the canvas is transparent, RGBA."""
        return self._image.resize((self.size, self.size), Image.Resampling.BOX)

    def _box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        s = self._scale
        return (x0 * s, y0 * s, max(x1, x0) * s, max(y1, y0) * s)

    def _width(self, width: float) -> int:
        return max(1, round(width * self._scale))


def _ints(color: Color) -> tuple[int, int, int, int]:
    return (int(color[0]), int(color[1]), int(color[2]), 255)
