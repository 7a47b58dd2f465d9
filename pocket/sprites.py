"""Sprites: 48 subjects in up to three drawings from openly licensed emoji sets, in any colour.

The sheet `sprites.npz` maps "SUBJECT|DRAWING" to RGBA [128, 128, 4]; NOTICE names the sets and licences.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocket.canvas import COLORS

Pixels = NDArray[np.uint8]
_SHEET = Path(__file__).with_name("sprites.npz")
_LUMINANCE = np.array((0.35, 0.5, 0.15), np.float32)


@cache
def sprite_sheet() -> dict[tuple[str, str], Pixels]:
    """Every sprite by (subject, drawing); drawings are "3d", "flat" and "noto"."""
    with np.load(_SHEET) as sheet:
        named = {name: sheet[name] for name in sheet.files}
    return {(name.split("|")[0], name.split("|")[1]): pixels for name, pixels in named.items()}


@cache
def subjects() -> dict[str, tuple[str, ...]]:
    """The drawings that each subject has, in a fixed order."""
    found: dict[str, list[str]] = {}
    for subject, drawing in sorted(sprite_sheet()):
        found.setdefault(subject, []).append(drawing)
    return {subject: tuple(drawings) for subject, drawings in found.items()}


@cache
def sprite(subject: str, drawing: str, color: str | None) -> Image.Image:
    """A subject, in its own colours or recoloured to one of COLORS: RGBA 128 x 128."""
    pixels = sprite_sheet()[subject, drawing]
    return Image.fromarray(pixels if color is None else recolor(pixels, color))


def recolor(pixels: Pixels, color: str) -> Pixels:
    """Maps luminance onto a ramp from a dark to a light tone of `color`; eyes and whites stay.

    RGBA [h, w, 4] in and out; alpha is unchanged.
    """
    rgb, alpha = pixels[..., :3].astype(np.float32), pixels[..., 3:]
    opaque = alpha[..., 0] > 128
    luminance = rgb @ _LUMINANCE
    low, high = np.percentile(luminance[opaque], (3, 97))
    level = np.clip((luminance - low) / max(float(high - low), 1.0), 0, 1)
    level = np.clip(0.5 + (level - np.median(level[opaque])) * 0.9, 0, 1)[..., None]
    tone = np.asarray(COLORS[color], np.float32)
    dark, light = tone * 0.35, tone + (255 - tone) * 0.55
    ramp = np.where(level < 0.5, dark + (tone - dark) * level * 2, tone + (light - tone) * (level * 2 - 1))
    # Where nearly all is white (a ghost), the white is the body and takes the colour.
    whiteness = float(np.mean(luminance[opaque] > 225))
    spared = 0.0 if whiteness > 0.4 else 0.6 if color == "black" else 0.85
    kept = _kept(rgb, luminance, spared)[..., None]
    painted = (ramp * (1 - kept) + rgb * kept).clip(0, 255).astype(np.uint8)
    return np.concatenate([painted, alpha], axis=-1)


def _kept(rgb: NDArray[np.float32], luminance: NDArray[np.float32], white: float) -> NDArray[np.float32]:
    """How far (0..1) each pixel is an outline, an eye or a highlight that recolouring must spare."""
    saturation = rgb.max(-1) - rgb.min(-1)
    black = np.clip((60 - luminance) / 25, 0, 1) * (saturation < 60)
    pale = np.clip((luminance - 225) / 20, 0, 1) * (saturation < 40) * white
    return np.asarray(np.maximum(black, pale), np.float32)
