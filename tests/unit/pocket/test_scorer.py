"""The scorer: what ships, loaded by transformers' own classes, tells pictures and words apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

import atelier_server.pocket
from pocket.canvas import COLORS
from pocket.captions import Attributes
from pocket.data import PictureSet, SetRecipe, draw_block
from pocket.labels import classes_of, exchanged, mistaken
from pocket.scorer import Scorer, save_scorer, zero_shot
from pocket.text import Towers, build_clip, load_text
from pocket.world import SMALL, paint

BASE = atelier_server.pocket.path()
CLASSES = classes_of(SMALL)
OCTOPUS = Attributes("octopus", "drawn", "red", "happy", "beach", None, "none")


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    return Scorer(BASE / "scorer")


def _painted(attributes: Attributes, seed: int, size: int = 64) -> Image.Image:
    return paint(attributes, np.random.default_rng(seed), size)


def test_transformers_loads_it_and_says_the_same(scorer: Scorer) -> None:
    clip, processor = (
        CLIPModel.from_pretrained(BASE / "scorer"),
        CLIPProcessor.from_pretrained(BASE / "scorer"),
    )
    pictures = [_painted(OCTOPUS, 1, 128)]
    ready = processor(
        text=["a red octopus"], images=pictures, return_tensors="pt", padding=True, truncation=True
    )
    with torch.no_grad():
        said = clip(**ready)
    cosine = said.logits_per_image.item() / clip.logit_scale.exp().item()
    assert scorer.text_similarity(pictures, ["a red octopus"]) == pytest.approx([cosine], abs=1e-5)


def test_it_answers_every_question_from_captions_alone(scorer: Scorer) -> None:
    """Of captions that differ in one answer the right one is nearest, on pictures that no training saw."""
    pixels, captions, attributes = draw_block(SetRecipe("small", 777, 192), 0, 192)
    asked = zero_shot(scorer, PictureSet(pixels, tuple(captions), tuple(attributes)), CLASSES)
    # The gate, 0.9, is measured on 512 pictures; expressions are asked about a third of these.
    assert all(share > 0.85 for share, _ in asked.values()), asked


def test_alike_pictures_are_nearer_than_others(scorer: Scorer) -> None:
    references = [_painted(OCTOPUS, seed) for seed in range(3)]
    other = Attributes("car", "3d", "green", None, "city", None, "none")
    near, far = scorer.image_similarity([_painted(OCTOPUS, 9), _painted(other, 9)], references)
    assert near > far + 0.2
    assert scorer.image_similarity(references[:1], references[:1]) == pytest.approx([1.0])


def test_every_picture_needs_a_caption(scorer: Scorer) -> None:
    with pytest.raises(ValueError, match="1 pictures and 2 captions: each picture needs one"):
        scorer.text_similarity([_painted(OCTOPUS, 1)], ["a", "b"])


def test_a_mistake_is_one_wrong_answer_about_what_is_shown() -> None:
    rng = np.random.default_rng(0)
    sketch = Attributes("octopus", "drawn", "red", "happy", None, "blue", "sketch")
    changed = set()
    for _ in range(60):
        wrong = mistaken(sketch, CLASSES, rng)
        assert wrong != sketch
        changed |= {name for name in Attributes.__slots__ if getattr(wrong, name) != getattr(sketch, name)}
    assert changed == {"subject", "style", "expression"}
    assert exchanged(OCTOPUS, "background", "plain pink").backdrop == "pink"
    assert set(COLORS) == set(CLASSES["color"])


def test_a_saved_scorer_is_whole(tmp_path: Path) -> None:
    tokenizer, text_encoder = load_text(BASE)
    towers = Towers(build_clip(tokenizer, like=text_encoder), CLASSES)
    save_scorer(towers.clip, tokenizer, tmp_path)
    [embedded] = Scorer(tmp_path).embed_texts(["a red octopus"])
    assert embedded.norm() == pytest.approx(1.0, abs=1e-4)
    assert next(towers.clip.parameters()).dtype == torch.float32
