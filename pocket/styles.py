"""The styles of the world: filters that turn a finished picture into a painting, a sketch, a neon sign, ...

A style tells what of a picture it hides, so that captions never name what nobody can see.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter

from pocket.canvas import Canvas, smooth_noise

Array = NDArray[np.float32]
Filter = Callable[[Image.Image, np.random.Generator], Image.Image]


@dataclass(frozen=True, slots=True)
class Style:
    """A look, the words before and after a subject that name it, and what it hides of a picture: "color" and
    "expression" of the subject, the "backdrop" colour; `merges` are colours that it does not tell apart."""

    name: str
    prefixes: tuple[str, ...]
    suffix: str
    apply: Filter
    hides: frozenset[str] = frozenset()
    merges: frozenset[str] = frozenset()


def _image(pixels: Array) -> Image.Image:
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _pixels(picture: Image.Image) -> Array:
    return np.asarray(picture, np.float32)


def _edge_distance(size: int) -> Array:
    """0 in the middle of a picture, 1 at its edges: [size, size]."""
    axis = np.abs(np.linspace(-1, 1, size, dtype=np.float32))
    return np.maximum(axis[:, None], axis[None, :])


def _plain(picture: Image.Image, _rng: np.random.Generator) -> Image.Image:
    return picture


def _oil(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Brush strokes: neighbouring pixels are dragged along curved bands, which also catch the light."""
    size = picture.width
    source = _pixels(picture.filter(ImageFilter.GaussianBlur(size / 210)))
    row, column = np.mgrid[0:size, 0:size]
    angle = smooth_noise(rng, size, 5) * 1.5
    band = (column * np.cos(angle) + row * np.sin(angle)) * 0.8 * 128 / size
    reach = 2.5 * size / 128
    from_row = (row + np.round(np.cos(band) * reach)).astype(int).clip(0, size - 1)
    from_column = (column + np.round(np.sin(band) * reach)).astype(int).clip(0, size - 1)
    light = np.sin(band).astype(np.float32)[..., None] * 13
    stroked = (source[from_row, from_column] - 128) * 1.12 + 124 + light
    return _image(stroked * np.array((1.05, 1.0, 0.9), np.float32)).filter(ImageFilter.MedianFilter(3))


def _old_master(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A darkened oil painting in a golden frame."""
    size = picture.width
    painted = _pixels(_oil(picture, rng))
    gray = painted.mean(-1, keepdims=True)
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    vignette = np.clip(1.12 - 0.5 * (axis[:, None] ** 2 + axis[None, :] ** 2), 0.25, 1.1)[..., None]
    aged = _image((painted * 0.6 + gray * 0.4) * np.array((1.0, 0.82, 0.55), np.float32) * vignette)
    frame, border = Canvas(size), 0.105
    for depth, tone in ((0.0, (120, 85, 20)), (0.015, (212, 168, 60)), (0.045, (250, 220, 130))):
        frame.rectangle(depth, depth, 1 - depth, 1 - depth, tone)
    frame.rectangle(0.068, 0.068, 0.932, 0.932, (205, 160, 55))
    frame.rectangle(border - 0.015, border - 0.015, 1.015 - border, 1.015 - border, (100, 70, 15))
    framed, edge = frame.finish(), round(border * size)
    framed.paste(aged.resize((size - 2 * edge, size - 2 * edge), Image.Resampling.BOX), (edge, edge))
    return framed


def _watercolor(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Pale washes on paper whose edge stays bare."""
    size = picture.width
    flat = _pixels(picture.filter(ImageFilter.MedianFilter(5)))
    washed = ImageEnhance.Color(_image(flat)).enhance(1.3)
    pale = _pixels(washed) * 0.68 + 255 * 0.32 + smooth_noise(rng, size, 10)[..., None] * 12
    edge = _edge_distance(size) + smooth_noise(rng, size, 16) * 0.05
    bare = np.asarray(np.clip((edge - 0.82) / 0.1, 0, 1), np.float32)[..., None]
    return _image(pale * (1 - bare) + np.array((252, 250, 244), np.float32) * bare)


def _sketch(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Graphite lines where tones meet, soft shading in the dark; specks are left out, as a hand would."""
    size = picture.width
    gray = picture.convert("L").filter(ImageFilter.MedianFilter(3 if size < 192 else 5))
    tone = _pixels(gray)
    blurred = _pixels(gray.filter(ImageFilter.GaussianBlur(size / 24)))
    lines = np.minimum(255, tone * 255 / (blurred + 1))
    drawn = (lines * 0.5 + (tone * 0.55 + 95) * 0.5 - 185) * 1.7 + 185
    paper = smooth_noise(rng, size, 10) * 3
    return _image((drawn - np.clip(110 - tone, 0, 110) * 0.35 + paper).clip(25, 250)).convert("RGB")


def _pixel_art(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Few large squares in few colours."""
    squares = int(rng.choice((26, 32)))
    small = picture.resize((squares, squares), Image.Resampling.BOX)
    vivid = np.asarray(ImageEnhance.Color(small).enhance(1.25))
    stepped = Image.fromarray((vivid // 32 * 32 + 16).astype(np.uint8))
    return stepped.resize(picture.size, Image.Resampling.NEAREST)


def _neon(picture: Image.Image, _rng: np.random.Generator) -> Image.Image:
    """Glowing outlines in the dark, in the picture's own hues. No tube is bent around a speck."""
    size = picture.width
    pixels = _pixels(picture.filter(ImageFilter.MedianFilter(3 if size < 192 else 5)))
    down = np.abs(np.diff(pixels, axis=0, prepend=pixels[:1]))
    right = np.abs(np.diff(pixels, axis=1, prepend=pixels[:, :1]))
    width = 3 if size < 192 else 5
    edges = _pixels(_image((down + right).max(-1)).filter(ImageFilter.MaxFilter(width))) / 255
    hue = pixels - pixels.min(-1, keepdims=True) * 0.8
    hue = hue / (hue.max(-1, keepdims=True) + 1e-3) * 255
    tubes = _image(hue * np.clip(edges * 2.2, 0, 1)[..., None])
    glow = _pixels(tubes.filter(ImageFilter.GaussianBlur(size / 42)))
    return _image(_pixels(tubes) + glow * 1.1 + 8)


STYLES: dict[str, Style] = {
    style.name: style
    for style in (
        Style("none", ("",), "", _plain),
        Style("photo", ("a photo of ",), ", photo", _plain),
        Style("oil", ("an oil painting of ", "a painting of "), ", oil painting", _oil),
        Style(
            "17th century",
            ("a 17th century painting in a golden frame of ", "an old painting in a golden frame of "),
            ", 17th century painting in a golden frame",
            _old_master,
        ),
        Style("watercolor", ("a watercolor of ", "a watercolor painting of "), ", watercolor", _watercolor),
        Style(
            "sketch",
            ("a pencil sketch of ", "a pencil drawing of "),
            ", pencil sketch",
            _sketch,
            frozenset({"color", "backdrop"}),
        ),
        Style(
            "pixel art",
            ("pixel art of ", "a pixel art image of "),
            ", pixel art",
            _pixel_art,
            frozenset({"expression"}),
        ),
        Style(
            "neon",
            ("a neon sign of ", "neon art of "),
            ", neon",
            _neon,
            frozenset({"backdrop"}),
            # A tube has a hue and no tone.
            merges=frozenset({"black", "brown", "gray", "white"}),
        ),
    )
}
