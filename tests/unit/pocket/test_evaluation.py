"""The evaluation: honest questions, copies found, and the stages from pictures to figures."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import atelier_server.pocket
from pocket.__main__ import main
from pocket.captions import Attributes
from pocket.classifier import Classifier, classifier_scores
from pocket.data import PictureSet
from pocket.evaluate import copies, evaluate
from pocket.labels import NOT_SHOWN, answers, classes_of, named, shares_right, shown_labels, told_labels
from pocket.model import save_model, size_mb
from pocket.painting import load_pipeline, paint, sheet
from pocket.scorer import Scorer
from pocket.text import load_text
from pocket.unet import load_unet
from pocket.vae import load_vae
from pocket.world import SMALL

BASE = atelier_server.pocket.path()
CLASSES = classes_of(SMALL)


def _shown(**changes: str | None) -> Attributes:
    facts: dict[str, str | None] = {
        "subject": "octopus",
        "drawing": "drawn",
        "color": "red",
        "expression": "sad",
        "scene": None,
        "backdrop": "green",
        "style": "none",
    }
    return Attributes(**(facts | changes))  # type: ignore[arg-type]


def test_nothing_is_asked_that_the_style_hides() -> None:
    sketch = answers(_shown(style="sketch"))
    assert (sketch["color"], sketch["background"], sketch["expression"]) == (None, None, "sad")
    assert answers(_shown(style="pixel art"))["expression"] is None
    neon = answers(_shown(style="neon"))
    assert (neon["color"], neon["background"]) == ("red", None)
    assert answers(_shown(style="neon", color="brown"))["color"] is None
    assert answers(_shown(style="photo"))["style"] == answers(_shown())["style"] == "as drawn"
    assert answers(_shown(scene="beach", backdrop=None))["background"] == "beach"


@pytest.mark.parametrize(
    ("caption", "untold"),
    [
        ("a sad red octopus on a green background", set()),
        ("a red octopus", {"background", "expression"}),
        ("a sad octopus with a red hat in front of a green background", {"color"}),
    ],
)
def test_only_what_a_caption_names_is_asked_of_its_picture(caption: str, untold: set[str]) -> None:
    given = named(_shown(), caption)
    assert {question for question, answer in given.items() if answer is None} == untold


def test_what_is_told_is_shown(tiny_set: PictureSet) -> None:
    shown, told = shown_labels(tiny_set, CLASSES), told_labels(tiny_set, CLASSES)
    for question in CLASSES:
        asked = told[question] != NOT_SHOWN
        assert asked.any()
        assert torch.equal(told[question][asked], shown[question][asked])


def test_shares_count_only_what_is_asked() -> None:
    heads = torch.nn.ModuleDict({"color": torch.nn.Identity()})
    logits = torch.eye(3)
    labels = {"color": torch.tensor([0, 0, NOT_SHOWN])}
    assert shares_right(heads, logits, labels) == {"color": (0.5, 2)}


def test_copies_are_found(tiny_set: PictureSet) -> None:
    known, unseen = tiny_set.pixels[:30], tiny_set.pixels[30:]
    assert copies(known[:4], unseen, known) == 1.0
    assert copies(unseen, unseen, known) <= 0.1


def test_an_evaluation_is_written_with_its_sheets(tiny_set: PictureSet, tmp_path: Path) -> None:
    torch.manual_seed(0)
    scorer = Scorer(BASE / "scorer")
    result = evaluate(
        BASE, Classifier(CLASSES), tiny_set, tiny_set, tmp_path, scorer=scorer, count=4, steps=2, guidance=3.0
    )
    written = json.loads((tmp_path / "evaluation.json").read_text())
    assert written["generated"].keys() == written["classifier_on_true"].keys() == CLASSES.keys()
    assert written["asked"]["subject"] == 4
    assert result.vae_db > 20
    # Two steps paint noise, so the true pictures are nearer to their captions.
    assert result.clip_score is not None
    assert result.clip_score_true is not None
    assert result.clip_score < result.clip_score_true
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "generated.png", "sheet.png"}


def test_a_picture_does_not_depend_on_its_batch() -> None:
    pipeline = load_pipeline(BASE)
    prompts = ["a red octopus on a beach", "a green car in the desert", "a cat"]
    together = paint(pipeline, prompts, [1, 2, 3], steps=2)
    alone = paint(pipeline, prompts[1:2], [2], steps=2)
    assert together.shape == (3, 64, 64, 3)
    assert np.abs(together[1].astype(int) - alone[0].astype(int)).max() <= 2
    assert sheet(together, columns=2, side=10).size == (20, 20)


def test_a_saved_model_loads_and_is_clean(tmp_path: Path) -> None:
    tokenizer, text_encoder = load_text(BASE)
    vae, unet = load_vae(BASE), load_unet(BASE)
    save_model(tmp_path, vae=vae, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)
    assert size_mb(tmp_path) < 20
    for path in tmp_path.rglob("*.json"):
        assert not {"_name_or_path", "name_or_path", "is_local"} & set(json.loads(path.read_text()))
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert pipeline.text_encoder.dtype == pipeline.unet.dtype == torch.float32
    assert next(unet.parameters()).dtype == torch.float32


def test_classifier_scores_answer_every_question(tiny_set: PictureSet) -> None:
    scores = classifier_scores(Classifier(CLASSES, (8, 16)), tiny_set.pixels, shown_labels(tiny_set, CLASSES))
    assert all(0 <= share <= 1 and asked > 0 for share, asked in scores.values())


TINY = (
    "--minutes",
    "9",
    "--max-steps",
    "2",
    "--pictures",
    "40",
    "--held-out",
    "24",
    "--painted",
    "2",
    "--sampling-steps",
    "2",
)


def _run(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["pocket", *words])
    main()


def test_the_stages_make_a_model_and_judge_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*TINY, "--work", str(tmp_path), "--from", str(BASE), "--json", "--below-gate")
    figures = {}
    for stage in ("text", "vae", "unet", "scorer", "evaluate"):
        _run(monkeypatch, stage, *options)
        figures[stage] = json.loads(capsys.readouterr().out)
    assert figures["vae"]["db"] > 20
    assert figures["unet"]["progress"]["step"] == 2
    assert figures["evaluate"]["clip_score"] is not None
    assert not figures["evaluate"]["gate"]
    assert StableDiffusionPipeline.from_pretrained(tmp_path / "model").tokenizer.model_max_length == 32


def test_a_stage_below_its_gate_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="text stays below its gate; --below-gate goes on all the same"):
        _run(monkeypatch, "text", *TINY, "--work", str(tmp_path))
