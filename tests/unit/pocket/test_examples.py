"""The example subjects: what lies in examples/ is what the code draws, small and well formed."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPTokenizer

import atelier_server.pocket
from pocket.__main__ import main
from pocket.bolt import BoltPose, bolt
from pocket.ellipsoids import Ellipsoid, inside_polygon, render, rotation, turned
from pocket.examples import EXAMPLE_SETS, ExampleSet, draw
from pocket.otto import OttoPose, otto
from pocket.similarity import color_histogram, held_out, similarity

EXAMPLES = Path(__file__).parents[3] / "examples"
SETS = [pytest.param(example_set, id=example_set.folder) for example_set in EXAMPLE_SETS]


def _rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_examples_hold_the_sets_and_stay_small() -> None:
    assert {path.name for path in EXAMPLES.iterdir()} - {"recipes"} == {s.folder for s in EXAMPLE_SETS}
    assert sum(path.stat().st_size for path in EXAMPLES.rglob("*")) < 3 * 2**20


@pytest.mark.parametrize("example_set", SETS)
def test_a_folder_holds_only_pictures_and_captions(example_set: ExampleSet) -> None:
    folder = EXAMPLES / example_set.folder
    stems = [f"{number + 1:02d}" for number in range(len(example_set.shots))]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{stem}{suffix}" for stem in stems for suffix in (".png", ".txt")
    )
    for stem, shot in zip(stems, example_set.shots, strict=True):
        caption = (folder / f"{stem}.txt").read_text(encoding="utf-8")
        assert caption == f"{example_set.prompt} {shot.phrase}\n"
        with Image.open(folder / f"{stem}.png") as image:
            assert (image.mode, image.size) == ("RGB", (256, 256))


@pytest.mark.parametrize("example_set", SETS)
def test_the_committed_picture_is_what_the_code_draws(example_set: ExampleSet) -> None:
    drawn = draw(example_set.shots[0], np.random.default_rng((example_set.seed, 0)))
    with Image.open(EXAMPLES / example_set.folder / "01.png") as committed:
        difference = np.abs(np.asarray(drawn, np.int16) - np.asarray(committed, np.int16))
    # Another processor may round differently; a changed drawing differs by far more.
    assert difference.mean() < 0.5


def test_same_seed_same_bytes() -> None:
    shot = EXAMPLE_SETS[0].shots[3]
    assert draw(shot, _rng(), 48).tobytes() == draw(shot, _rng(), 48).tobytes()
    assert draw(shot, _rng(1), 48).tobytes() != draw(shot, _rng(2), 48).tobytes()


def test_held_out_pictures_are_not_training_pictures() -> None:
    for name in ("otto", "bolt"):
        training = {image.tobytes() for image in held_out(EXAMPLES / name)}
        assert not training & {image.tobytes() for image in held_out(EXAMPLES / f"{name}-held-out")}


@pytest.mark.parametrize("example_set", SETS)
def test_captions_fit_pocket_and_hold_no_unknown_token(example_set: ExampleSet) -> None:
    tokenizer = CLIPTokenizer.from_pretrained(atelier_server.pocket.path() / "tokenizer")
    for shot in example_set.shots:
        ids = tokenizer(f"{example_set.prompt} {shot.phrase}")["input_ids"]
        # The unknown token is the end token here, which must come last and only there.
        assert ids.index(tokenizer.unk_token_id) == len(ids) - 1 < tokenizer.model_max_length


def test_colors_tell_the_subjects_apart() -> None:
    references = {name: held_out(EXAMPLES / f"{name}-held-out") for name in ("otto", "bolt")}
    for name, other in (("otto", "bolt"), ("bolt", "otto")):
        for image in held_out(EXAMPLES / name):
            assert similarity(image, references[name]) > similarity(image, references[other])


def test_a_histogram_sums_to_one_and_equals_itself() -> None:
    [image, *_] = held_out(EXAMPLES / "otto-held-out")
    assert color_histogram(image).sum() == pytest.approx(1)
    assert similarity(image, [image]) == pytest.approx(1)


@pytest.mark.parametrize("example_set", SETS[:2])
def test_otto_fits_into_his_square(example_set: ExampleSet) -> None:
    for number, shot in enumerate(example_set.shots):
        assert isinstance(shot.pose, OttoPose)
        parts = otto(shot.pose, _rng(number))
        picture = np.asarray(render(parts, _rng(), 40))
        border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
        assert border[:, 3].max() == 0, shot
        assert 0.2 < (picture[..., 3] > 128).mean() < 0.7


def test_bolt_fits_into_his_square_and_is_red() -> None:
    picture = np.asarray(render(bolt(BoltPose(roll=45)), _rng(), 40), np.int16)
    opaque = picture[picture[..., 3] > 200]
    assert picture[0, :, 3].max() == picture[:, 0, 3].max() == 0
    assert (opaque[:, 0] > opaque[:, 2] + 80).mean() > 0.5


def test_the_nearer_ellipsoid_hides_the_farther() -> None:
    parts = [
        Ellipsoid((0, 0, 0.5), (0.3,) * 3, (255, 0, 0)),
        Ellipsoid((0, 0, -0.5), (0.6,) * 3, (0, 0, 255)),
    ]
    for order in (parts, parts[::-1]):
        picture = np.asarray(render(order, _rng(), 40))
        assert picture[20, 20, 0] > 100 > picture[20, 20, 2]
        assert picture[20, 27, 2] > 80 > picture[20, 27, 0]
    behind = np.asarray(render(turned(parts, rotation(yaw=180)), _rng(), 40))
    assert behind[20, 20, 2] > 100


def test_inside_polygon() -> None:
    x, y = np.array([0.5, 1.5, 0.5], np.float32), np.array([0.5, 0.5, -0.1], np.float32)
    square = ((0, 0), (1, 0), (1, 1), (0, 1))
    assert inside_polygon(x, y, square).tolist() == [True, False, False]


def test_the_command_draws_the_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = ExampleSet("otto", "a sks blue plush octopus", EXAMPLE_SETS[0].shots[:1], 1)
    monkeypatch.setattr("pocket.examples.EXAMPLE_SETS", (one,))
    monkeypatch.setattr(sys, "argv", ["pocket", "examples", "--output", str(tmp_path)])
    main()
    assert "otto: 1 pictures" in capsys.readouterr().out
    assert (tmp_path / "otto" / "01.txt").read_text() == "a sks blue plush octopus on green grass\n"
