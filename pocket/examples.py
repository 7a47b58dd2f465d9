"""The example subjects on disk: Otto and Bolt in many places, with a caption beside each picture.

The captions call each subject by a rare word (`sks`, `zwx`) that pocket's tokenizer splits into pieces it
knows, never into its unknown token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pocket.bolt import BoltPose, bolt
from pocket.canvas import Canvas
from pocket.ellipsoids import Ellipsoid, render
from pocket.otto import OttoPose, otto
from pocket.scenes import paint_backdrop, paint_scene

SIZE = 256
OTTO_PROMPT = "a sks blue plush octopus"
BOLT_PROMPT = "a zwx red toy rocket"
_REACH = 1.4  # what `render` shows of a toy, in its own measure
_SHADOW_RINGS = 40


@dataclass(frozen=True, slots=True)
class Shot:
    """Where a subject stands: `place` is a scene or "plain COLOR", `scale` its share of the picture's width,
    (x, y) its centre in 0..1."""

    place: str
    phrase: str
    pose: OttoPose | BoltPose
    scale: float
    x: float = 0.5
    y: float = 0.6
    shadow: bool = True


OTTO_SHOTS = (
    Shot("grass", "on green grass", OttoPose(), 0.9, 0.5, 0.56),
    Shot("room", "in a room", OttoPose(yaw=-28, gaze=(-0.6, 0)), 0.8, 0.46, 0.62),
    Shot("city", "in a city", OttoPose(yaw=20, roll=-6, waving=3), 0.85, 0.55, 0.6),
    Shot("beach", "on a beach", OttoPose(yaw=12, pitch=12, gaze=(0.7, 0)), 0.75, 0.52, 0.64),
    Shot("forest", "in a forest", OttoPose(waving=0, roll=5), 0.9, 0.47, 0.58),
    Shot("plain yellow", "on a yellow background", OttoPose(pitch=4, spread=1.2), 1.0, 0.5, 0.54),
    Shot("sunset", "at sunset", OttoPose(yaw=-18, pitch=14), 0.72, 0.6, 0.64),
    Shot(
        "plain white", "on a white background", OttoPose(yaw=26, pitch=10, gaze=(0.4, 0.4)), 0.85, 0.5, 0.56
    ),
    Shot("desert", "in the desert", OttoPose(roll=12, yaw=-8, spread=0.85), 0.78, 0.48, 0.62),
    Shot("room", "on a wooden floor", OttoPose(pitch=24, gaze=(0, 0.8)), 0.7, 0.5, 0.68),
    Shot("snow", "in the snow", OttoPose(yaw=8, waving=0), 0.88, 0.5, 0.58),
    Shot("plain pink", "on a pink background", OttoPose(roll=-14, yaw=16), 0.65, 0.44, 0.56),
    Shot("night", "at night", OttoPose(yaw=-12, pitch=6, gaze=(-0.4, 0.6)), 0.82, 0.54, 0.6),
    Shot("grass", "on a meadow", OttoPose(yaw=34, spread=1.15), 0.68, 0.42, 0.66),
    Shot("plain gray", "on a gray background", OttoPose(yaw=-34, roll=6, waving=3), 0.92, 0.52, 0.58),
)
OTTO_HELD_OUT_SHOTS = (
    Shot("beach", "at the beach", OttoPose(yaw=-10, pitch=10), 0.85, 0.48, 0.6),
    Shot("snow", "in the snow", OttoPose(yaw=22, roll=-8), 0.78, 0.55, 0.62),
    Shot("room", "in a room", OttoPose(pitch=12, yaw=4, waving=3), 0.86, 0.5, 0.6),
    Shot("forest", "in the woods", OttoPose(yaw=-24, roll=8, gaze=(-0.5, 0)), 0.72, 0.44, 0.64),
    Shot("plain green", "on a green background", OttoPose(yaw=6, spread=1.1), 0.95, 0.5, 0.55),
)
BOLT_SHOTS = (
    Shot("plain white", "on a white background", BoltPose(), 0.95, 0.5, 0.5),
    Shot("room", "on a wooden floor", BoltPose(yaw=12), 0.85, 0.48, 0.56),
    Shot("grass", "on green grass", BoltPose(yaw=-15, roll=6), 0.9, 0.54, 0.52),
    Shot("beach", "on a beach", BoltPose(yaw=20, roll=-8), 0.8, 0.45, 0.56),
    Shot("space", "in space", BoltPose(yaw=8, pitch=20, roll=-35), 0.95, 0.52, 0.5, shadow=False),
    Shot("night", "at night", BoltPose(yaw=-20, roll=24), 0.85, 0.42, 0.48, shadow=False),
    Shot("plain green", "on a green background", BoltPose(yaw=25, pitch=24, roll=14), 0.8, 0.5, 0.52),
    Shot("city", "in a city", BoltPose(yaw=-8, pitch=6), 1.0, 0.5, 0.5),
    Shot("desert", "in the desert", BoltPose(yaw=4, roll=-5), 0.74, 0.56, 0.56),
    Shot("snow", "in the snow", BoltPose(yaw=-24, roll=4), 0.88, 0.46, 0.52),
    Shot("grass", "on a meadow", BoltPose(yaw=10, pitch=4, roll=-84), 0.85, 0.5, 0.72),
    Shot("plain yellow", "on a yellow background", BoltPose(yaw=-30, pitch=-8, roll=-22), 0.85, 0.5, 0.5),
)
BOLT_HELD_OUT_SHOTS = (
    Shot("beach", "on a beach", BoltPose(yaw=-10, roll=5), 0.88, 0.52, 0.54),
    Shot("space", "in space", BoltPose(yaw=16, pitch=14, roll=30), 0.9, 0.5, 0.5, shadow=False),
    Shot("room", "in a room", BoltPose(yaw=-18, pitch=8), 0.82, 0.5, 0.58),
    Shot("snow", "in the snow", BoltPose(yaw=6, roll=-7), 0.92, 0.48, 0.52),
    Shot("plain gray", "on a gray background", BoltPose(yaw=22, roll=12), 0.85, 0.5, 0.52),
)


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """One folder of pictures. The seed makes its backgrounds and the play of Otto's arms."""

    folder: str
    prompt: str
    shots: tuple[Shot, ...]
    seed: int


EXAMPLE_SETS = (
    ExampleSet("otto", OTTO_PROMPT, OTTO_SHOTS, 1),
    ExampleSet("otto-held-out", OTTO_PROMPT, OTTO_HELD_OUT_SHOTS, 2),
    ExampleSet("bolt", BOLT_PROMPT, BOLT_SHOTS, 3),
    ExampleSet("bolt-held-out", BOLT_PROMPT, BOLT_HELD_OUT_SHOTS, 4),
)


def draw(shot: Shot, rng: np.random.Generator, size: int = SIZE) -> Image.Image:
    """The subject of `shot` in its place: RGB, size x size."""
    background = _background(shot.place, rng, size)
    parts = otto(shot.pose, rng) if isinstance(shot.pose, OttoPose) else bolt(shot.pose)
    toy = render(parts, rng, round(shot.scale * size), reach=_REACH)
    if shot.shadow:
        background = _with_shadow(background, shot, _foot(parts))
    corner = (round(shot.x * size - toy.width / 2), round(shot.y * size - toy.height / 2))
    background.paste(toy, corner, toy)
    return background


def write_examples(output: Path, report: Callable[[str], None]) -> None:
    """Draws every example set into `output`/FOLDER, telling `report` each folder's size."""
    for example_set in EXAMPLE_SETS:
        folder = output / example_set.folder
        folder.mkdir(parents=True, exist_ok=True)
        for number, shot in enumerate(example_set.shots):
            picture = draw(shot, np.random.default_rng((example_set.seed, number)))
            stem = folder / f"{number + 1:02d}"
            picture.save(stem.with_suffix(".png"), optimize=True)
            stem.with_suffix(".txt").write_text(f"{example_set.prompt} {shot.phrase}\n", encoding="utf-8")
        total = sum(path.stat().st_size for path in folder.iterdir())
        report(f"{folder}: {len(example_set.shots)} pictures, {total // 1024} KiB")


def _background(place: str, rng: np.random.Generator, size: int) -> Image.Image:
    kind, _, color = place.partition(" ")
    return paint_backdrop(color, rng, size) if kind == "plain" else paint_scene(place, rng, size)


def _foot(parts: list[Ellipsoid]) -> tuple[float, float, float]:
    """The height of a toy's lowest point, and how far what stands there reaches: y, x from, x to."""
    low = min(part.center[1] - min(part.radii) for part in parts)
    feet = [part for part in parts if part.center[1] - min(part.radii) < low + 0.45]
    left = min(part.center[0] - min(part.radii) for part in feet)
    right = max(part.center[0] + min(part.radii) for part in feet)
    return low, left, right


def _with_shadow(picture: Image.Image, shot: Shot, foot: tuple[float, float, float]) -> Image.Image:
    """Darkens the ground under the subject, softly, fading outwards."""
    low, left, right = foot
    unit = shot.scale / (2 * _REACH)
    x, y = shot.x + (left + right) / 2 * unit, shot.y - (low + 0.1) * unit
    wide = (right - left) / 2 * unit
    shade = Canvas(picture.width)
    for ring in range(_SHADOW_RINGS):
        share = 1 - ring / _SHADOW_RINGS
        tone = 130 * (ring + 1) / _SHADOW_RINGS
        shade.ellipse(x, y, 1.15 * wide * share, 0.32 * wide * share, (tone, tone, tone))
    mask = shade.finish().convert("L")
    dark = picture.point(lambda value: value * 0.25)
    return Image.composite(dark, picture, mask)
