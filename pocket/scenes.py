"""The places of the world: twelve backgrounds, each one function that paints a canvas.

A scene is told apart at 64 pixels by its two bands of colour and one or two landmarks; everything else varies
with the random generator.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pocket.canvas import COLORS, Canvas, Color, jitter, mix, smooth_noise

Painter = Callable[[Canvas, np.random.Generator], None]


@dataclass(frozen=True, slots=True)
class Scene:
    """A kind of background and the phrases that name it in a caption."""

    name: str
    phrases: tuple[str, ...]
    paint: Painter


def paint_scene(name: str, rng: np.random.Generator, size: int, grain: float = 3.0) -> Image.Image:
    """Paints a scene of SCENES at `size` pixels; `grain` is the strength of its uneven light (0..255)."""
    canvas = Canvas(size)
    SCENES[name].paint(canvas, rng)
    return _uneven(canvas.finish(), rng, grain)


def paint_backdrop(color: str, rng: np.random.Generator, size: int) -> Image.Image:
    """A plain wall in a colour of COLORS, a little darker at its foot."""
    canvas, tone = Canvas(size), jitter(COLORS[color], rng)
    canvas.gradient(0, 1, tone, mix(tone, (0, 0, 0), 0.12))
    return _uneven(canvas.finish(), rng, 2.0)


def _uneven(picture: Image.Image, rng: np.random.Generator, grain: float) -> Image.Image:
    pixels = np.asarray(picture, np.float32) + smooth_noise(rng, picture.width, 8)[..., None] * grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _ground(
    canvas: Canvas, rng: np.random.Generator, sky: tuple[Color, Color], soil: tuple[Color, Color]
) -> float:
    """Two bands, sky above soil; returns the height of the horizon."""
    horizon = float(rng.uniform(0.45, 0.62))
    canvas.gradient(0, horizon, jitter(sky[0], rng), jitter(sky[1], rng))
    canvas.gradient(horizon, 1, jitter(soil[0], rng), jitter(soil[1], rng))
    return horizon


def _cloud(canvas: Canvas, rng: np.random.Generator) -> None:
    x, y, r = rng.uniform(0.1, 0.9), rng.uniform(0.07, 0.22), rng.uniform(0.035, 0.055)
    for offset, share in ((-1.5, 0.7), (1.6, 0.75), (-0.5, 1.0), (0.6, 1.1)):
        canvas.ellipse(x + offset * r, y - (share - 0.7) * r, 1.3 * r * share, r * share, (252, 253, 255))


def _stars(canvas: Canvas, rng: np.random.Generator, count: int, floor: float) -> None:
    for _ in range(count):
        r = rng.uniform(0.004, 0.008)
        canvas.ellipse(rng.uniform(0, 1), rng.uniform(0, floor), r, r, (255, 255, 225))


def _beach(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((110, 190, 250), (200, 230, 255)), ((242, 218, 155), (222, 186, 118)))
    shore = horizon - rng.uniform(0.1, 0.2)
    canvas.gradient(shore, horizon, jitter((30, 110, 190), rng), jitter((70, 190, 210), rng))
    wave = [(x / 16, horizon + 0.008 * math.sin(x * 1.3 + shore * 40)) for x in range(17)]
    canvas.line(wave, 0.016, (250, 252, 252))
    if rng.random() < 0.6:
        x, y = rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.2)
        canvas.ellipse(x, y, 0.07, 0.07, (255, 240, 120))
    for _ in range(8):
        canvas.ellipse(rng.uniform(0, 1), rng.uniform(horizon + 0.08, 1), 0.008, 0.005, (205, 170, 110))


def _snow(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((150, 185, 225), (215, 230, 245)), ((250, 252, 255), (222, 233, 248)))
    for _ in range(rng.integers(1, 4)):
        x, h = rng.uniform(0, 1), rng.uniform(0.2, 0.4)
        canvas.polygon([(x - h, horizon), (x, horizon - h), (x + h, horizon)], (160, 182, 210))
        cap = [(x - 0.4 * h, horizon - 0.6 * h), (x, horizon - h), (x + 0.4 * h, horizon - 0.6 * h)]
        canvas.polygon(
            [*cap, (x + 0.12 * h, horizon - 0.68 * h), (x - 0.1 * h, horizon - 0.55 * h)], (255, 255, 255)
        )
    for _ in range(16):
        r = rng.uniform(0.006, 0.011)
        canvas.ellipse(rng.uniform(0, 1), rng.uniform(0, 1), r, r, (255, 255, 255))


def _forest(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((125, 180, 155), (170, 210, 168)), ((74, 116, 54), (50, 82, 36)))
    for foot in sorted(rng.uniform(horizon, horizon + 0.12, size=rng.integers(7, 11))):
        x, h, green = rng.uniform(-0.05, 1.05), rng.uniform(0.35, 0.6), rng.uniform(62, 112)
        canvas.rectangle(x - 0.015, foot - 0.2 * h, x + 0.015, foot, (88, 58, 33))
        for level, width, top in ((0.0, 0.25, 0.6), (0.28, 0.21, 0.82), (0.5, 0.17, 1.0)):
            low = foot - 0.15 * h - level * h
            shade = mix((24, green, 42), (70, 140, 70), level * 0.4)
            canvas.polygon([(x - width * h, low), (x, foot - top * h), (x + width * h, low)], shade)


def _night(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((8, 10, 40), (32, 38, 95)), ((27, 33, 50), (12, 15, 28)))
    _stars(canvas, rng, 12, horizon)
    x, y, r = float(rng.choice([0.15, 0.85])), 0.15, 0.08
    canvas.ellipse(x, y, r, r, (246, 241, 205))
    canvas.ellipse(x + 0.5 * r, y - 0.2 * r, 0.9 * r, 0.9 * r, (13, 16, 50))


def _desert(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((250, 205, 130), (255, 235, 190)), ((226, 152, 78), (190, 115, 55)))
    dune = [(x / 20, horizon - 0.03 * math.sin(x / 20 * 7 + horizon * 30) - 0.02) for x in range(21)]
    canvas.polygon([(0, horizon + 0.05), *dune, (1, horizon + 0.05)], (232, 165, 92))
    for _ in range(rng.integers(1, 4)):
        x = float(rng.choice([rng.uniform(0.05, 0.25), rng.uniform(0.75, 0.95)]))
        _cactus(canvas, x, horizon + rng.uniform(0.05, 0.2), rng.uniform(0.25, 0.4))


def _cactus(canvas: Canvas, x: float, foot: float, height: float) -> None:
    green, w = (45, 125, 60), 0.055
    canvas.line([(x, foot), (x, foot - height)], w, green)
    left, right = foot - 0.42 * height, foot - 0.55 * height
    canvas.line([(x, left), (x - 0.09, left), (x - 0.09, left - 0.3 * height)], 0.7 * w, green)
    canvas.line([(x, right), (x + 0.09, right), (x + 0.09, right - 0.3 * height)], 0.7 * w, green)
    canvas.line([(x - 0.01, foot), (x - 0.01, foot - height)], 0.2 * w, (85, 165, 90))


def _underwater(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient(0, 1, jitter((60, 190, 225), rng), jitter((5, 50, 120), rng))
    floor = [(x / 8, 0.9 + rng.uniform(-0.03, 0.03)) for x in range(9)]
    canvas.polygon([(0, 1), *floor, (1, 1)], (200, 182, 125))
    for _ in range(4):
        x, length = rng.uniform(0, 1), int(rng.integers(4, 9))
        weed = [(x + 0.02 * math.sin(j), 0.96 - 0.05 * j) for j in range(length)]
        canvas.line(weed, 0.03, (30, 140, 80))
    for _ in range(7):
        canvas.ring(
            rng.uniform(0, 1), rng.uniform(0, 0.85), rng.uniform(0.016, 0.032), 0.008, (205, 240, 255)
        )


def _city(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((150, 180, 210), (215, 220, 230)), ((112, 112, 117), (80, 80, 85)))
    x = -0.04
    while x < 1:
        width, height = rng.uniform(0.12, 0.2), rng.uniform(0.2, min(0.48, horizon))
        tone = rng.uniform(80, 150)
        canvas.rectangle(x, horizon - height, x + width, horizon, (tone, tone - 8, tone - 4))
        for left in np.arange(x + 0.02, x + width - 0.04, 0.07):
            for top in np.arange(horizon - height + 0.03, horizon - 0.06, 0.1):
                if rng.random() < 0.7:
                    canvas.rectangle(left, top, left + 0.036, top + 0.05, (250, 235, 150))
        x += width + rng.uniform(0, 0.03)
    canvas.rectangle(0, horizon, 1, horizon + 0.025, (165, 165, 168))


def _grass(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((120, 190, 250), (205, 230, 250)), ((112, 197, 72), (60, 140, 40)))
    for _ in range(rng.integers(1, 4)):
        _cloud(canvas, rng)
    petals: tuple[Color, ...] = ((255, 90, 110), (255, 240, 90), (255, 255, 255))
    for _ in range(14):
        x, y = rng.uniform(0, 1), rng.uniform(horizon + 0.03, 1)
        canvas.line([(x, y), (x, y + 0.02)], 0.005, (50, 120, 40))
        canvas.ellipse(x, y, 0.014, 0.014, petals[rng.integers(len(petals))])
        canvas.ellipse(x, y, 0.005, 0.005, (235, 170, 40))


def _sunset(canvas: Canvas, rng: np.random.Generator) -> None:
    horizon = _ground(canvas, rng, ((90, 40, 120), (255, 140, 60)), ((80, 45, 90), (40, 25, 60)))
    x = rng.uniform(0.2, 0.8)
    canvas.chord(x, horizon, 0.14, 0.14, (180, 360), (255, 235, 130))
    for j in range(5):
        half = 0.12 - 0.018 * j
        y = horizon + 0.02 + 0.035 * j
        canvas.line([(x - half, y), (x + half, y)], 0.009, (235, 150, 100))


def _space(canvas: Canvas, rng: np.random.Generator) -> None:
    canvas.gradient(0, 1, jitter((8, 5, 20), rng, 6), jitter((28, 12, 55), rng, 10))
    for _ in range(3):
        x, y, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.15, 0.3)
        for ring in range(8):
            canvas.ellipse(
                x, y, r * (1 - ring / 8), 0.5 * r * (1 - ring / 8), (20 + 3 * ring, 9, 40 + 5 * ring)
            )
    _stars(canvas, rng, 18, 1.0)
    planets: tuple[Color, ...] = ((220, 150, 90), (120, 170, 230), (200, 100, 160))
    color = planets[rng.integers(len(planets))]
    x, y, r = float(rng.choice([0.15, 0.85])), float(rng.choice([0.18, 0.8])), rng.uniform(0.08, 0.13)
    canvas.ellipse(x, y, r, r, color)
    canvas.chord(x, y, r, r, (20, 160), mix(color, (0, 0, 0), 0.25))
    canvas.line([(x - 1.6 * r, y + 0.4 * r), (x + 1.6 * r, y - 0.4 * r)], 0.022, (235, 215, 180))


def _room(canvas: Canvas, rng: np.random.Generator) -> None:
    walls: tuple[Color, ...] = ((235, 220, 190), (190, 210, 220), (220, 190, 190), (200, 215, 180))
    wall = walls[rng.integers(len(walls))]
    horizon = _ground(canvas, rng, (wall, mix(wall, (0, 0, 0), 0.08)), ((172, 118, 68), (135, 85, 45)))
    for j in range(-1, 6):
        top = j / 4
        canvas.line([(top, horizon), (0.5 + (top - 0.5) * 2.2, 1)], 0.01, (112, 72, 37))
    canvas.rectangle(0, horizon - 0.022, 1, horizon + 0.005, (246, 242, 232))
    x = float(rng.choice([0.08, 0.68]))
    canvas.rectangle(x - 0.02, 0.06, x + 0.26, 0.36, (125, 82, 52))
    canvas.rectangle(x, 0.08, x + 0.24, 0.34, (172, 217, 251))
    canvas.rectangle(x + 0.11, 0.08, x + 0.13, 0.34, (125, 82, 52))
    canvas.rectangle(x, 0.2, x + 0.24, 0.218, (125, 82, 52))


SCENES: dict[str, Scene] = {
    scene.name: scene
    for scene in (
        Scene("beach", ("on a beach", "at the beach", "on the sand by the sea"), _beach),
        Scene("snow", ("in the snow", "on a snowy mountain"), _snow),
        Scene("forest", ("in a forest", "in the woods"), _forest),
        Scene("night", ("at night", "under a starry night sky"), _night),
        Scene("desert", ("in the desert", "in a desert"), _desert),
        Scene("underwater", ("under water", "in the ocean", "underwater"), _underwater),
        Scene("city", ("in a city", "in front of a city"), _city),
        Scene("grass", ("on green grass", "on a meadow"), _grass),
        Scene("sunset", ("at sunset", "in front of a sunset"), _sunset),
        Scene("space", ("in space", "in outer space"), _space),
        Scene("room", ("in a room", "on a wooden floor"), _room),
    )
}
