"""Picture sets: the same bytes however they were made, and made once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pocket import data
from pocket.creatures import CREATURES
from pocket.data import PictureSet, SetRecipe, picture_set
from pocket.world import SMALL, picture


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    recipe = SetRecipe("small", 5, 70, 32)
    alone = picture_set(recipe, tmp_path / "one")
    together = picture_set(recipe, tmp_path / "two", workers=2)
    assert np.array_equal(alone.pixels, together.pixels)
    assert (alone.captions, alone.attributes) == (together.captions, together.attributes)
    assert alone.pixels.shape == (70, 32, 32, 3)


def test_a_set_is_the_worlds_pictures(tmp_path: Path) -> None:
    found = picture_set(SetRecipe("small", 9, 6, 128), tmp_path)
    for number in range(6):
        shown = picture(9, number, 128, SMALL)
        assert np.array_equal(found.pixels[number], np.asarray(shown.image))
        assert (found.captions[number], found.attributes[number]) == (shown.caption, shown.attributes)


def test_a_finished_set_is_opened_not_drawn(
    tiny_set: PictureSet, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "draw_block", pytest.fail)
    assert picture_set(SetRecipe("small", 1, 48), tiny_folder).captions == tiny_set.captions


def test_an_interrupted_set_is_drawn_again(tmp_path: Path) -> None:
    recipe = SetRecipe("small", 2, 4, 16)
    whole = np.array(picture_set(recipe, tmp_path).pixels)
    [home] = tmp_path.iterdir()
    (home / "set.json").unlink()
    (home / "pixels.npy").write_bytes(b"half")
    assert np.array_equal(picture_set(recipe, tmp_path).pixels, whole)


def test_the_small_world_wears_things_and_never_wears_its_own_color() -> None:
    shown = [picture(3, number, 8, SMALL).attributes for number in range(150)]
    assert {a.subject for a in shown} == set(SMALL.subjects)
    worn = [a for a in shown if a.accessory]
    assert worn
    assert all(a.subject in CREATURES and a.accessory[0] != a.color for a in worn if a.accessory)


def test_captions_name_what_is_worn(tiny_set: PictureSet) -> None:
    for number in range(400):
        shown = picture(4, number, 8, SMALL)
        if " with " in shown.caption:
            assert shown.attributes.accessory is not None
            assert " ".join(shown.attributes.accessory) in shown.caption
            return
    pytest.fail("nobody wears anything")
