"""Otto: one particular blue plush octopus that the world has never seen.

His marks: a golden star on the forehead, a red and white scarf, pink tips on eight arms, a cream chin, rosy
cheeks, and always a smile.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocket.canvas import Color
from pocket.ellipsoids import Array, Ellipsoid, inside_polygon, rotation, turned

_BLUE: Color = (40, 124, 214)
_DEEP_BLUE: Color = (26, 92, 172)
_CREAM: Color = (252, 236, 202)
_PINK: Color = (255, 150, 172)
_RED: Color = (222, 40, 46)
_WHITE: Color = (252, 252, 250)
_INK: Color = (18, 18, 28)
_HEAD = ((0.0, 0.3, 0.0), (0.78, 0.74, 0.66))
_MUZZLE = ((0.0, 0.06, 0.47), (0.36, 0.27, 0.21))
_STAR = tuple(
    (r * float(np.sin(i * np.pi / 5)), r * float(np.cos(i * np.pi / 5)))
    for i, r in enumerate((0.3, 0.14) * 5)
)
_ARMS = 8


@dataclass(frozen=True, slots=True)
class OttoPose:
    """How Otto sits. Angles in degrees; `gaze` moves the pupils (-1..1), `waving` raises an arm (0..7)."""

    yaw: float = 0.0
    pitch: float = 8.0
    roll: float = 0.0
    spread: float = 1.0
    gaze: tuple[float, float] = (0.0, 0.0)
    waving: int | None = None


def otto(pose: OttoPose, rng: np.random.Generator) -> list[Ellipsoid]:
    """Otto's parts in world axes; the random generator only moves his arms. He fits into -1.4..1.4."""
    parts = [
        Ellipsoid(*_HEAD, _BLUE, decal=_face, fuzz=0.9),
        Ellipsoid(*_MUZZLE, _CREAM, decal=_smile, fuzz=0.15),
        *_eyes(pose.gaze),
        *_scarf(),
    ]
    for arm in range(_ARMS):
        parts += _arm(arm, pose, rng)
    return turned(parts, rotation(pose.yaw, pose.pitch, pose.roll))


def _face(points: Array, colors: Array) -> Array:
    """Rosy cheeks and a golden star."""
    x, y, front = points[:, 0], points[:, 1], points[:, 2] > 0
    painted = colors.copy()
    painted[front & (((np.abs(x) - 0.62) / 0.15) ** 2 + ((y + 0.16) / 0.11) ** 2 < 1)] = _PINK
    painted[front & inside_polygon(x, y - 0.64, _STAR)] = (255, 214, 40)
    return painted


def _smile(points: Array, colors: Array) -> Array:
    """An open, laughing mouth with a tongue."""
    x, y, front = points[:, 0], points[:, 1], points[:, 2] > 0
    painted = colors.copy()
    mouth = (
        front & ((x / 0.62) ** 2 + ((y - 0.28) / 0.78) ** 2 < 1) & (y < 0.28 - 0.12 * (1 - (x / 0.62) ** 2))
    )
    painted[mouth] = (92, 14, 32)
    painted[mouth & ((x / 0.4) ** 2 + ((y + 0.5) / 0.34) ** 2 < 1)] = (246, 108, 124)
    return painted


def _eyes(gaze: tuple[float, float]) -> list[Ellipsoid]:
    parts = []
    for side in (-1, 1):
        x, y, z = 0.3 * side, 0.44, 0.575
        turn = rotation(yaw=26 * side, pitch=-6)
        parts.append(Ellipsoid((x, y, z), (0.2, 0.23, 0.08), _WHITE, turn, gloss=0.3))
        px, py = x + 0.05 * gaze[0], y - 0.01 + 0.05 * gaze[1]
        parts.append(Ellipsoid((px, py, z + 0.055), (0.125, 0.15, 0.06), _INK, turn, gloss=0.5))
        parts.append(Ellipsoid((px - 0.045, py + 0.06, z + 0.115), (0.045, 0.045, 0.02), _WHITE))
    return parts


def _scarf() -> list[Ellipsoid]:
    parts = []
    count = 64
    for i in range(count):
        angle = 2 * np.pi * i / count
        center = (0.67 * float(np.cos(angle)), -0.24, 0.62 * float(np.sin(angle)))
        color = _RED if (i // 4) % 2 else _WHITE
        parts.append(Ellipsoid(center, (0.115, 0.125, 0.115), color, fuzz=0.5))
    for i in range(12):  # the loose end, on his left
        t = i / 11
        center = (0.34 + 0.14 * t, -0.28 - 0.5 * t, 0.66 + 0.14 * float(np.sin(2.4 * t)))
        color = _WHITE if i in (4, 5, 9, 10) else _RED
        parts.append(Ellipsoid(center, (0.14, 0.07, 0.06), color, rotation(roll=16), fuzz=0.5))
    return parts


def _arm(arm: int, pose: OttoPose, rng: np.random.Generator) -> list[Ellipsoid]:
    """A chain of balls from under the scarf, outwards and down, with a curled pink tip."""
    around = 2 * np.pi * (arm + 0.5) / _ARMS + rng.uniform(-0.12, 0.12)
    length, curl, sway = (
        pose.spread * rng.uniform(0.5, 0.64),
        rng.uniform(0.1, 0.34),
        rng.uniform(-0.35, 0.35),
    )
    color = _DEEP_BLUE if arm % 2 else _BLUE
    waving = arm == pose.waving
    parts = []
    count = 15
    for i in range(count):
        t = i / (count - 1)
        out = 0.4 + length * t * (1.15 if waving else 1.0)
        angle = around + sway * t * t
        height = -0.3 + 0.95 * t**1.6 if waving else -0.3 - 0.62 * np.sin(1.9 * t) + curl * t**3
        center = (out * float(np.cos(angle)), float(height), out * float(np.sin(angle)) * 0.9)
        r = 0.2 - 0.06 * t
        parts.append(Ellipsoid(center, (r, r, r), color, fuzz=1.0))
    tip = parts[-1].center
    return [*parts, Ellipsoid(tip, (0.165, 0.165, 0.165), _PINK, fuzz=0.8)]
