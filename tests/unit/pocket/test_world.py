"""The world: reproducible to the byte, and honest in its captions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pocket.canvas import COLORS
from pocket.captions import Attributes, describe, plainly
from pocket.creatures import CREATURES, EXPRESSIONS, creature
from pocket.scenes import SCENES, paint_backdrop, paint_scene
from pocket.sprites import recolor, sprite, sprite_sheet, subjects
from pocket.styles import STYLES
from pocket.world import draw_attributes, paint, picture, write_sheet

SIZE = 64


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("number", range(6))
def test_same_seed_same_bytes(number: int) -> None:
    first, second = picture(7, number, SIZE), picture(7, number, SIZE)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.caption, first.attributes) == (second.caption, second.attributes)


def test_pictures_do_not_depend_on_their_order() -> None:
    forwards = [picture(3, n, SIZE).image.tobytes() for n in range(4)]
    backwards = [picture(3, n, SIZE).image.tobytes() for n in reversed(range(4))]
    assert forwards == backwards[::-1]
    assert len(set(forwards)) == 4


def test_another_seed_is_another_world() -> None:
    assert picture(1, 0, SIZE).image.tobytes() != picture(2, 0, SIZE).image.tobytes()


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("size", [SIZE, 200])
def test_every_scene_paints_at_any_size(scene: str, size: int) -> None:
    image = paint_scene(scene, _rng(), size)
    assert (image.mode, image.size) == ("RGB", (size, size))
    assert np.asarray(image).std() > 5


@pytest.mark.parametrize("style", STYLES)
def test_every_style_changes_the_picture_and_keeps_its_size(style: str) -> None:
    scene = paint_scene("beach", _rng(), 128)
    styled = STYLES[style].apply(scene, _rng())
    assert (styled.mode, styled.size) == ("RGB", (128, 128))
    assert (styled.tobytes() == scene.tobytes()) == (style in ("none", "photo"))


@pytest.mark.parametrize("kind", CREATURES)
def test_expressions_of_a_creature_differ(kind: str) -> None:
    faces = {creature(kind, COLORS["green"], mood, _rng(), SIZE).tobytes() for mood in EXPRESSIONS}
    assert len(faces) == len(EXPRESSIONS)


def test_an_unknown_creature_is_refused() -> None:
    with pytest.raises(ValueError, match="'dodo' is none of octopus, monster, slime"):
        creature("dodo", COLORS["red"], "happy", _rng())


def test_every_sprite_is_a_picture_with_transparency() -> None:
    for pixels in sprite_sheet().values():
        assert pixels.shape == (128, 128, 4)
        assert 0 < (pixels[..., 3] > 128).mean() < 1
    assert len(subjects()) == 48


@pytest.mark.parametrize("color", COLORS)
def test_recoloring_moves_a_sprite_to_the_color(color: str) -> None:
    pixels = sprite_sheet()["car", "3d"]
    painted = recolor(pixels, color)
    opaque = pixels[..., 3] > 200
    middle = np.median(painted[opaque][:, :3], axis=0)
    nearest = min(COLORS, key=lambda name: float(np.abs(middle - np.array(COLORS[name])).sum()))
    assert nearest == color
    assert np.array_equal(painted[..., 3], pixels[..., 3])


def test_a_sprite_keeps_its_own_colors() -> None:
    assert np.array_equal(np.asarray(sprite("car", "3d", None)), sprite_sheet()["car", "3d"])


def test_captions_never_name_what_the_style_hides() -> None:
    rng = _rng()
    for _ in range(60):
        sketch = describe(Attributes("octopus", "drawn", "red", "sad", None, "green", "sketch"), rng)
        assert not set(sketch.split()) & {"red", "green"}
        pixels = describe(Attributes("octopus", "drawn", "red", "sad", "beach", None, "pixel art"), rng)
        assert "sad" not in pixels.split()
        neon = describe(Attributes("octopus", "drawn", "white", "sad", None, "green", "neon"), rng)
        assert not set(neon.split()) & {"white", "green"}


def test_the_plain_caption_leaves_out_only_what_is_hidden() -> None:
    shown = Attributes("octopus", "drawn", "red", "sad", None, "green", "oil")
    assert plainly(shown) == "an oil painting of a sad red octopus on a green background"
    assert plainly(replace(shown, style="sketch")) == "a pencil sketch of a sad octopus"
    assert (
        plainly(replace(shown, style="none", scene="beach", backdrop=None)) == "a sad red octopus on a beach"
    )


def test_captions_name_the_subject_and_mostly_the_rest() -> None:
    rng = _rng()
    shown = Attributes("octopus", "drawn", "orange", "angry", "beach", None, "none")
    captions = [describe(shown, rng) for _ in range(200)]
    assert all("octopus" in caption for caption in captions)
    assert sum("orange" in caption for caption in captions) > 150
    assert any(caption.startswith("an angry orange octopus") for caption in captions)
    assert not any(caption.startswith("a angry") for caption in captions)


def test_attributes_cover_the_world() -> None:
    rng = _rng()
    drawn = [draw_attributes(rng) for _ in range(1500)]
    assert {a.style for a in drawn} == set(STYLES)
    assert {a.scene for a in drawn} == {*SCENES, None}
    assert {a.color for a in drawn} == {*COLORS, None}
    assert {a.expression for a in drawn} == {*EXPRESSIONS, None}
    assert {*subjects(), *CREATURES} == {a.subject for a in drawn}
    assert all((a.scene is None) != (a.backdrop is None) for a in drawn)


def test_a_plain_backdrop_has_its_color() -> None:
    middle = np.asarray(paint_backdrop("green", _rng(), SIZE)).mean((0, 1))
    assert np.abs(middle - np.array(COLORS["green"])).max() < 30


def test_paint_shows_the_subject() -> None:
    shown = Attributes("octopus", "drawn", "red", "happy", None, "green", "none")
    center = np.asarray(paint(shown, _rng(), SIZE), np.float32)[20:50, 16:48]
    assert (center[..., 0] > center[..., 1] + 60).mean() > 0.2


def test_a_sheet_is_written_with_its_captions(tmp_path: Path) -> None:
    captions = write_sheet(tmp_path / "sheet.png", 0, rows=1, columns=3, size=SIZE)
    assert len(captions) == 3
    assert (tmp_path / "sheet.png").stat().st_size > 0
