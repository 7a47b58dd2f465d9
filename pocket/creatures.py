"""Creatures with a face: octopus, monster and slime, each in five expressions.

They are the world's only source of expressions, and Otto's nearest kin; none of them wears Otto's marks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pocket.canvas import Canvas, Color, mix

CREATURES = ("octopus", "monster", "slime")
EXPRESSIONS = ("happy", "sad", "angry", "surprised", "sleepy")

ACCESSORIES = ("hat", "bow tie", "glasses", "spots")

_INK: Color = (20, 16, 20)
_WHITE: Color = (255, 255, 255)


@dataclass(frozen=True, slots=True)
class Accessory:
    """What a creature wears: one of ACCESSORIES, in a colour. None of them is one of Otto's marks."""

    kind: str
    color: Color


@dataclass(frozen=True, slots=True)
class _Head:
    """Where the face goes: centre and half axes of the head."""

    x: float
    y: float
    rx: float
    ry: float


def creature(
    kind: str,
    color: Color,
    expression: str,
    rng: np.random.Generator,
    size: int = 128,
    *,
    accessory: Accessory | None = None,
) -> Image.Image:
    """Draws one of CREATURES with one of EXPRESSIONS: RGBA, size x size, background transparent."""
    canvas = Canvas(size, transparent=True)
    head = _Head(0.5, 0.5, rng.uniform(0.27, 0.33), rng.uniform(0.25, 0.32))
    if kind == "octopus":
        head = _octopus(canvas, head, color, rng)
    elif kind == "monster":
        head = _monster(canvas, head, color)
    elif kind == "slime":
        head = _slime(canvas, head, color)
    else:
        raise ValueError(f"{kind!r} is none of {', '.join(CREATURES)}")
    light = mix(color, _WHITE, 0.45)
    canvas.ellipse(head.x - 0.47 * head.rx, head.y - 0.62 * head.ry, 0.22 * head.rx, 0.17 * head.ry, light)
    if accessory and accessory.kind == "spots":
        _spots(canvas, head, accessory.color)
    eye = rng.uniform(0.065, 0.085)
    _eyes(canvas, head, expression, eye)
    _mouth(canvas, head, expression)
    if expression == "sad":
        canvas.ellipse(head.x - 0.42 * head.rx, head.y + 1.9 * eye, 0.03, 0.045, (90, 180, 250))
    if accessory:
        _worn(canvas, head, accessory, eye)
    return canvas.finish()


def _octopus(canvas: Canvas, head: _Head, color: Color, rng: np.random.Generator) -> _Head:
    head = _Head(head.x, 0.41, head.rx, head.ry)
    dark = mix(color, (0, 0, 0), 0.3)
    count = int(rng.choice((4, 5, 6, 8)))
    width = 0.094 * 5 / max(count, 5)
    for arm in range(count):
        side = arm - (count - 1) / 2
        root = head.x + side / (count / 2) * head.rx * 1.05
        phase = rng.uniform(0, 2 * math.pi)
        points = [
            (
                root + 0.04 * math.sin(phase + 0.55 * j) + 0.007 * side * j,
                head.y + 0.3 * head.ry + 0.047 * j,
            )
            for j in range(9)
        ]
        canvas.line(points, width, dark if arm % 2 else color)
    canvas.ellipse(head.x, head.y, head.rx, head.ry, color)
    return head


def _monster(canvas: Canvas, head: _Head, color: Color) -> _Head:
    dark = mix(color, (0, 0, 0), 0.3)
    x, y, rx, ry = head.x, head.y, head.rx, head.ry
    for side in (-1, 1):
        horn = [(0.75, -0.5), (0.6, -1.35), (0.2, -0.8)]
        canvas.polygon([(x + side * a * rx, y + b * ry) for a, b in horn], dark)
        canvas.ellipse(x + 0.5 * side * rx, y + 1.2 * ry, 0.11, 0.05, dark)
    canvas.rectangle(x - rx, y - ry, x + rx, y + 1.2 * ry, color, radius=0.6 * rx)
    return head


def _slime(canvas: Canvas, head: _Head, color: Color) -> _Head:
    x, y, rx, ry = head.x, head.y, head.rx * 1.2, head.ry
    canvas.chord(x, y + 0.3 * ry, rx, 1.3 * ry, (180, 360), color)
    canvas.rectangle(x - rx, y + 0.28 * ry, x + rx, y + ry, color, radius=0.08)
    canvas.rectangle(x - rx, y + 0.28 * ry, x + rx, y + 0.5 * ry, color)
    return _Head(x, y + 0.05, head.rx, ry)


def _eyes(canvas: Canvas, head: _Head, expression: str, eye: float) -> None:
    y = head.y - 0.016
    for side in (-1, 1):
        x = head.x + 0.42 * side * head.rx
        if expression == "sleepy":
            canvas.arc(x, y, eye, eye, (20, 160), 0.024, _INK)
            continue
        canvas.ellipse(x, y, eye, eye, _WHITE)
        canvas.ellipse(x, y, 0.55 * eye, 0.55 * eye, _INK)
        canvas.ellipse(x - 0.2 * eye, y - 0.22 * eye, 0.17 * eye, 0.17 * eye, _WHITE)
        if expression == "angry":
            brow = [(x - 1.2 * side * eye, y - 0.5 * eye), (x + 1.2 * side * eye, y - 1.5 * eye)]
            canvas.line(brow, 0.032, _INK)
        elif expression == "sad":
            brow = [(x - 1.1 * side * eye, y - 1.7 * eye), (x + 1.1 * side * eye, y - 1.0 * eye)]
            canvas.line(brow, 0.025, _INK)


def _mouth(canvas: Canvas, head: _Head, expression: str) -> None:
    x, y, w = head.x, head.y + 0.45 * head.ry, 0.38 * head.rx
    if expression == "happy":
        canvas.chord(x, y, w, 0.9 * w, (0, 180), (120, 20, 30))
    elif expression == "sad":
        canvas.arc(x, y + 0.8 * w, w, 0.8 * w, (195, 345), 0.03, _INK)
    elif expression == "angry":
        canvas.line([(x - w, y + 0.5 * w), (x + w, y + 0.3 * w)], 0.03, _INK)
    elif expression == "surprised":
        canvas.ellipse(x, y + 0.35 * w, 0.45 * w, 0.55 * w, (60, 15, 25))
    else:
        canvas.line([(x - 0.5 * w, y + 0.3 * w), (x + 0.5 * w, y + 0.3 * w)], 0.024, _INK)


def _spots(canvas: Canvas, head: _Head, color: Color) -> None:
    for x, y, r in ((-0.72, 0.28, 0.13), (0.74, 0.2, 0.15), (0.3, -0.66, 0.16), (-0.05, -0.78, 0.1)):
        canvas.ellipse(head.x + x * head.rx, head.y + y * head.ry, r * head.rx, r * head.rx, color)


def _worn(canvas: Canvas, head: _Head, accessory: Accessory, eye: float) -> None:
    """A hat above the head, a bow tie under it, or glasses around the eyes."""
    x, y, rx, ry, color = head.x, head.y, head.rx, head.ry, accessory.color
    if accessory.kind == "hat":
        canvas.rectangle(x - 0.5 * rx, y - 1.5 * ry, x + 0.5 * rx, y - 0.8 * ry, color, radius=0.02)
        canvas.rectangle(x - 0.85 * rx, y - 0.92 * ry, x + 0.85 * rx, y - 0.74 * ry, color, radius=0.02)
    elif accessory.kind == "bow tie":
        for side in (-1, 1):
            wing = [(0, 0.95), (0.5, 0.72), (0.5, 1.2)]
            canvas.polygon([(x + side * a * rx, y + b * ry) for a, b in wing], color)
        canvas.ellipse(x, y + 0.95 * ry, 0.035, 0.035, mix(color, (0, 0, 0), 0.35))
    elif accessory.kind == "glasses":
        for side in (-1, 1):
            canvas.arc(x + 0.42 * side * rx, y - 0.016, 1.35 * eye, 1.35 * eye, (0, 360), 0.026, color)
        canvas.line([(x - 0.1 * rx, y - 0.016), (x + 0.1 * rx, y - 0.016)], 0.026, color)
