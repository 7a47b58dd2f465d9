"""The world: captioned pictures without end, each reproducible from a seed and a number.

A picture is a subject (a drawn creature or a sprite) in a colour, at a place, in a style. `picture(seed, i)`
depends on nothing else, so any number of processes can make any part of a set, in any order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.canvas import COLORS, jitter
from pocket.captions import Attributes, describe
from pocket.creatures import ACCESSORIES, CREATURES, EXPRESSIONS, Accessory, creature
from pocket.scenes import SCENES, paint_backdrop, paint_scene
from pocket.sprites import sprite, subjects
from pocket.styles import STYLES

_CREATURE_WEIGHTS = (0.5, 0.25, 0.25)  # octopus first: the example subject's kin
_PLAIN_SHARE = 0.17
_OWN_COLORS_SHARE = 0.28
# Half of all pictures stay as drawn.
_STYLE_WEIGHTS = {"none": 4, "photo": 2}


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the world that a model is taught.

    `drawings` maps each subject of the sprites to the drawings it may be shown in. A share of
    `creature_share` (0..1) of the pictures shows a creature, and `accessory_share` of those wear something.
    """

    drawings: Mapping[str, tuple[str, ...]]
    creature_share: float
    accessory_share: float = 0.0

    @property
    def subjects(self) -> tuple[str, ...]:
        """Every subject that a picture can show, in a fixed order."""
        return tuple(sorted({*self.drawings, *CREATURES}))


WHOLE = Part(subjects(), creature_share=0.22)
_FEW = (
    *("balloon", "bear", "car", "cat", "fish", "house", "mushroom", "octopus"),
    *("penguin", "pig", "rabbit", "rocket", "tree", "turtle"),
)
# What a small network can draw crisply: 16 subjects, one drawing each.
SMALL = Part(dict.fromkeys(_FEW, ("3d",)), creature_share=0.36, accessory_share=0.3)


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture with its caption and what it was made from."""

    image: Image.Image
    caption: str
    attributes: Attributes


def picture(seed: int, number: int, size: int = 128, part: Part = WHOLE) -> Picture:
    """Picture `number` of the world `seed`: the same arguments give the same bytes and words."""
    rng = np.random.default_rng((seed, number))
    attributes = draw_attributes(rng, part)
    image = paint(attributes, rng, size)
    return Picture(image, describe(attributes, rng), attributes)


def draw_attributes(rng: np.random.Generator, part: Part = WHOLE) -> Attributes:
    """Chooses what a picture shows."""
    colors = tuple(COLORS)
    expression: str | None = None
    accessory: tuple[str, str] | None = None
    color: str | None = str(rng.choice(colors))
    if rng.random() < part.creature_share:
        subject, drawing = str(rng.choice(CREATURES, p=_CREATURE_WEIGHTS)), "drawn"
        expression = str(rng.choice(EXPRESSIONS))
        if part.accessory_share and rng.random() < part.accessory_share:
            accessory = (str(rng.choice([other for other in colors if other != color])), _accessory(rng))
    else:
        subject = str(rng.choice(tuple(part.drawings)))
        drawing = str(rng.choice(part.drawings[subject]))
        color = None if rng.random() < _OWN_COLORS_SHARE else color
    plain = rng.random() < _PLAIN_SHARE
    scene, backdrop = str(rng.choice(tuple(SCENES))), str(rng.choice(colors))
    weights = np.array([_STYLE_WEIGHTS.get(name, 1) for name in STYLES], np.float64)
    style = str(rng.choice(tuple(STYLES), p=weights / weights.sum()))
    return Attributes(
        subject,
        drawing,
        color,
        expression,
        None if plain else scene,
        backdrop if plain else None,
        style,
        accessory,
    )


def _accessory(rng: np.random.Generator) -> str:
    return str(rng.choice(ACCESSORIES))


def paint(attributes: Attributes, rng: np.random.Generator, size: int) -> Image.Image:
    """Paints what `attributes` say: RGB, size x size."""
    if attributes.scene is not None:
        background = paint_scene(attributes.scene, rng, size)
    else:
        background = paint_backdrop(attributes.backdrop or "white", rng, size)
    placed = _place(background, _subject(attributes, rng, size), rng)
    return STYLES[attributes.style].apply(placed, rng)


def write_sheet(path: Path, seed: int, rows: int = 8, columns: int = 10, size: int = 128) -> list[str]:
    """Saves a sheet of the first pictures of a world; returns their captions."""
    sheet = Image.new("RGB", (columns * size, rows * size))
    captions = []
    for number in range(rows * columns):
        shown = picture(seed, number, size)
        sheet.paste(shown.image, (number % columns * size, number // columns * size))
        captions.append(shown.caption)
    sheet.save(path)
    return captions


def _subject(attributes: Attributes, rng: np.random.Generator, size: int) -> Image.Image:
    if attributes.expression is None:
        return sprite(attributes.subject, attributes.drawing, attributes.color)
    color = jitter(COLORS[attributes.color or "gray"], rng, 10)
    worn = attributes.accessory and Accessory(attributes.accessory[1], COLORS[attributes.accessory[0]])
    return creature(attributes.subject, color, attributes.expression, rng, size, accessory=worn)


def _place(background: Image.Image, subject: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Puts a subject onto the lower middle of a background, sometimes mirrored or tilted."""
    side = int(background.width * rng.uniform(0.55, 0.85))
    figure = subject.resize((side, side), Image.Resampling.BILINEAR, reducing_gap=2)
    if rng.random() < 0.5:
        figure = figure.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < 0.5:
        figure = figure.rotate(rng.uniform(-14, 14), Image.Resampling.BILINEAR)
    room = background.width - side
    background.paste(figure, (int(room * rng.uniform(0.2, 0.8)), int(room * rng.uniform(0.45, 1))), figure)
    return background
