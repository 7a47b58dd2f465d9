"""A small ray caster for toys made of ellipsoids.

Everything is seen from +z by parallel rays (x right, y up, z towards the viewer), so a ray meets an ellipsoid
where a quadratic equation says, and a depth buffer keeps the nearest. Plush is made by displacing the rays a
little, which frays the outline, and by bending the normals, which makes the pile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pocket.canvas import Color, Point, smooth_noise

Array = NDArray[np.float32]
Decal = Callable[
    [Array, Array], Array
]  # (points [n, 3] on the unit sphere, colours [n, 3]) -> colours [n, 3]

_LIGHT = np.array((-0.42, 0.68, 0.6), np.float32)


@dataclass(frozen=True)
class Ellipsoid:
    """One part of a toy. `turn` [3, 3] rotates its own axes into the toy's; `decal` paints its surface.

    `fuzz` (0..1) is how long its pile is, `gloss` (0..1) how brightly it mirrors the light.
    """

    center: tuple[float, float, float]
    radii: tuple[float, float, float]
    color: Color
    turn: Array | None = None
    decal: Decal | None = None
    fuzz: float = 0.0
    gloss: float = 0.0


def rotation(yaw: float = 0.0, pitch: float = 0.0, roll: float = 0.0) -> Array:
    """Rotation by degrees: yaw about y (to its left), then pitch about x (towards us), then roll about z."""
    (cy, cp, cr), (sy, sp, sr) = (f(np.radians((yaw, pitch, roll))) for f in (np.cos, np.sin))
    about_y = np.array(((cy, 0, sy), (0, 1, 0), (-sy, 0, cy)))
    about_x = np.array(((1, 0, 0), (0, cp, -sp), (0, sp, cp)))
    about_z = np.array(((cr, -sr, 0), (sr, cr, 0), (0, 0, 1)))
    return np.asarray(about_z @ about_x @ about_y, np.float32)


def turned(parts: Sequence[Ellipsoid], turn: Array) -> list[Ellipsoid]:
    """The same parts after the whole toy is rotated about its origin."""
    result = []
    for part in parts:
        x, y, z = (float(v) for v in turn @ np.asarray(part.center, np.float32))
        result.append(replace(part, center=(x, y, z), turn=turn if part.turn is None else turn @ part.turn))
    return result


def inside_polygon(x: Array, y: Array, corners: Sequence[Point]) -> NDArray[np.bool_]:
    """Which points [n] lie inside a polygon, by the even-odd rule."""
    inside = np.zeros(x.shape, np.bool_)
    for (x0, y0), (x1, y1) in zip(corners, (*corners[1:], corners[0]), strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    return inside


class _Buffers:
    """What the nearest surface is like, a value a ray: [s, s] and [s, s, 3]."""

    def __init__(self, side: int) -> None:
        self.depth: Array = np.full((side, side), -np.inf, np.float32)
        self.normal: Array = np.zeros((side, side, 3), np.float32)
        self.color: Array = np.zeros((side, side, 3), np.float32)
        self.fuzz: Array = np.zeros((side, side), np.float32)
        self.gloss: Array = np.zeros((side, side), np.float32)


def render(
    parts: Sequence[Ellipsoid],
    rng: np.random.Generator,
    size: int,
    *,
    reach: float = 1.4,
    supersampling: int = 3,
) -> Image.Image:
    """Draws a toy on a transparent square that shows -reach..reach in both directions: RGBA, size x size."""
    side = size * supersampling
    axis = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 * reach - reach
    x, y = (np.asarray(grid, np.float32) for grid in np.meshgrid(axis, -axis))
    # The pile has a length in the toy's own measure, so it looks the same at every size.
    pile = [smooth_noise(rng, side, min(170, side)) for _ in range(2)]
    buffers = _Buffers(side)
    for part in parts:
        _cast(part, x, y, pile, buffers)
    rgba = np.concatenate([_shade(buffers, pile, side), _alpha(buffers)], axis=-1)
    # Averaging needs colours weighted by alpha, else the black outside bleeds into the edge.
    rgba[..., :3] *= rgba[..., 3:] / 255
    small = rgba.reshape(size, supersampling, size, supersampling, 4).mean(axis=(1, 3))
    small[..., :3] /= np.maximum(small[..., 3:] / 255, 1e-3)
    return Image.fromarray((small + 0.5).clip(0, 255).astype(np.uint8))


def _cast(part: Ellipsoid, x: Array, y: Array, pile: Sequence[Array], buffers: _Buffers) -> None:
    """Meets every ray near the part with it and keeps what is nearer than before."""
    center, bound = part.center, max(part.radii) * 1.05 + 0.05
    rows = np.flatnonzero(np.abs(y[:, 0] - center[1]) <= bound)
    columns = np.flatnonzero(np.abs(x[0] - center[0]) <= bound)
    if not len(rows) or not len(columns):
        return
    window = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
    turn = np.eye(3, dtype=np.float32) if part.turn is None else part.turn
    to_unit = (turn / np.asarray(part.radii, np.float32)).T  # world offset -> the unit sphere
    dx = x[window] - center[0] + pile[0][window] * 0.012 * part.fuzz
    dy = y[window] - center[1] + pile[1][window] * 0.012 * part.fuzz
    start = dx[..., None] * to_unit[:, 0] + dy[..., None] * to_unit[:, 1]  # [h, w, 3]
    a = float(to_unit[:, 2] @ to_unit[:, 2])
    b = start @ to_unit[:, 2]
    root = b * b - a * ((start * start).sum(-1) - 1)
    dz = (-b + np.sqrt(np.maximum(root, 0))) / a
    nearer = (root > 0) & (center[2] + dz > buffers.depth[window])
    unit = start[nearer] + dz[nearer][:, None] * to_unit[:, 2]  # [n, 3]
    normal = unit @ to_unit
    color: Array = np.broadcast_to(np.asarray(part.color, np.float32), unit.shape)
    buffers.depth[window][nearer] = center[2] + dz[nearer]
    buffers.normal[window][nearer] = normal / np.linalg.norm(normal, axis=-1, keepdims=True)
    buffers.color[window][nearer] = color if part.decal is None else part.decal(unit, color)
    buffers.fuzz[window][nearer] = part.fuzz
    buffers.gloss[window][nearer] = part.gloss


def _shade(buffers: _Buffers, pile: Sequence[Array], side: int) -> Array:
    """Colours under one soft lamp from the upper left: wrapped diffuse light, contact shade, gloss."""
    bend = np.stack([pile[0], pile[1], np.zeros_like(pile[0])], axis=-1) * buffers.fuzz[..., None] * 0.2
    normal = buffers.normal + bend
    normal /= np.maximum(np.linalg.norm(normal, axis=-1, keepdims=True), 1e-6)
    light = _LIGHT / np.linalg.norm(_LIGHT)
    facing = normal @ light
    diffuse = np.clip(0.5 + 0.5 * facing, 0, 1) ** 1.3
    lit = buffers.color * (0.42 + 0.72 * diffuse * (1 - _occlusion(buffers.depth, side)))[..., None]
    half = light + np.array((0, 0, 1), np.float32)
    mirror = np.clip(normal @ (half / np.linalg.norm(half)), 0, 1) ** 40 * buffers.gloss
    rim = np.clip(1 - normal[..., 2], 0, 1) ** 3 * buffers.fuzz * 0.35 * np.clip(facing + 0.4, 0, 1)
    glow = np.clip(mirror + rim, 0, 1)[..., None]
    return np.asarray(lit * (1 - glow) + 255 * glow, np.float32).clip(0, 255)


def _occlusion(depth: Array, side: int) -> Array:
    """How much a point lies behind its neighbourhood (0..0.5): shade in folds and where parts touch."""
    solid = np.where(np.isfinite(depth), depth, np.float32(-0.6))
    coarse = Image.fromarray(solid).resize((36, 36), Image.Resampling.BOX)
    around = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))
    return np.asarray(np.clip((around - solid) * 1.1, 0, 0.5), np.float32)


def _alpha(buffers: _Buffers) -> Array:
    return np.asarray(np.isfinite(buffers.depth)[..., None] * 255.0, np.float32)
