"""Bolt: one particular red toy rocket, of tin and lacquer.

His marks: a yellow lightning bolt, a checkered band, yellow fins, a blue porthole in a brass ring, a yellow
ball on the nose.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pocket.canvas import Color
from pocket.ellipsoids import Array, Ellipsoid, inside_polygon, rotation, turned

_RED: Color = (218, 34, 38)
_YELLOW: Color = (255, 208, 36)
_WHITE: Color = (250, 250, 248)
_BLACK: Color = (30, 30, 36)
_BODY = ((0.0, 0.1, 0.0), (0.46, 1.05, 0.46))
_FINS = 4
_LIGHTNING = ((0.1, -0.01), (-0.16, -0.27), (-0.03, -0.27), (-0.1, -0.47), (0.16, -0.19), (0.03, -0.19))


@dataclass(frozen=True, slots=True)
class BoltPose:
    """How the rocket stands or flies, in degrees; yaw turns him about his own axis."""

    yaw: float = 0.0
    pitch: float = 10.0
    roll: float = 0.0


def bolt(pose: BoltPose) -> list[Ellipsoid]:
    """The rocket's parts in world axes. He fits into -1.4..1.4."""
    parts = [
        Ellipsoid(*_BODY, _RED, decal=_lacquer, gloss=0.8),
        Ellipsoid((0, 1.16, 0), (0.13, 0.13, 0.13), _YELLOW, gloss=0.8),
        Ellipsoid((0, -0.92, 0), (0.3, 0.16, 0.3), (120, 122, 130), gloss=0.7),
        Ellipsoid((0, 0.36, 0.4), (0.25, 0.25, 0.07), _YELLOW, gloss=0.6),
        Ellipsoid((0, 0.36, 0.44), (0.18, 0.18, 0.07), (70, 170, 240), gloss=1.0),
    ]
    for fin in range(_FINS):
        angle = 360 * (fin + 0.5) / _FINS
        x, z = float(np.cos(np.radians(angle))), float(np.sin(np.radians(angle)))
        blade = rotation(yaw=-angle) @ rotation(roll=28)
        parts.append(Ellipsoid((0.46 * x, -0.72, 0.46 * z), (0.24, 0.46, 0.06), _YELLOW, blade, gloss=0.6))
    return turned(parts, rotation(pose.yaw, pose.pitch, pose.roll))


def _lacquer(points: Array, colors: Array) -> Array:
    """White nose line, checkered band, lightning bolt in front."""
    x, y, z = points.T
    painted = colors.copy()
    painted[np.abs(y - 0.66) < 0.045] = _WHITE
    band = np.abs(y + 0.56) < 0.11
    column = np.floor(np.arctan2(x, z) / (2 * np.pi) * 16)
    row = np.floor((y + 0.56) / 0.11)
    painted[band] = np.where(((column + row) % 2 == 0)[band, None], _BLACK, _WHITE)
    painted[(z > 0) & inside_polygon(x * _BODY[1][0], y * _BODY[1][1], _LIGHTNING)] = _YELLOW
    return painted
