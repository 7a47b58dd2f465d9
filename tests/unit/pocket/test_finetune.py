"""Teaching one subject: each method changes what it should and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

import atelier_server.pocket
from pocket import finetune
from pocket.__main__ import main
from pocket.finetune import METHODS, load_subject, teach, with_new_word
from pocket.painting import load_pipeline

BASE = atelier_server.pocket.path()
EXAMPLES = Path(__file__).parents[3] / "examples"


def _weights(pipeline: StableDiffusionPipeline) -> dict[str, Tensor]:
    parts = {"unet": pipeline.unet, "text": pipeline.text_encoder, "vae": pipeline.vae}
    return {f"{p}.{n}": v.clone() for p, part in parts.items() for n, v in part.state_dict().items()}


@pytest.mark.parametrize("method", METHODS)
def test_a_method_changes_only_its_own_weights(method: str) -> None:
    pipeline = load_pipeline(BASE)
    before = _weights(pipeline)
    subject = load_subject(EXAMPLES / "otto", 64)
    if method == "textual-inversion":
        subject = with_new_word(subject)
    losses = teach(pipeline, subject, method, steps=2, batch_size=2)
    assert len(losses) == 2
    assert np.isfinite(losses).all()
    after = {name.replace(".base_layer", ""): value for name, value in _weights(pipeline).items()}
    table = "text.embeddings.token_embedding.weight"
    assert torch.equal(after[table][: len(before[table])], before[table])
    changed = {name for name, value in before.items() if name != table and not value.equal(after[name])}
    assert {name.split(".")[0] for name in changed} == ({"unet"} if method == "dreambooth" else set())
    added = {name for name in after if name not in before}
    assert (added != set()) == (method == "lora")
    assert all(".lora_" in name for name in added)
    assert (len(after[table]) == len(before[table]) + 1) == (method == "textual-inversion")


def test_the_subject_is_loaded_with_its_captions() -> None:
    subject = load_subject(EXAMPLES / "otto", 64)
    assert subject.pixels.shape == (15, 3, 64, 64)
    assert subject.captions[0] == "a sks blue plush octopus on green grass"
    assert with_new_word(subject).captions[0] == "a <sks> blue plush octopus on green grass"


def test_teaching_lowers_the_loss() -> None:
    losses = teach(load_pipeline(BASE), load_subject(EXAMPLES / "otto", 64), "lora", steps=24)
    assert np.mean(losses[-8:]) < np.mean(losses[:8])


def test_the_command_compares_before_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(finetune, "SEEDS", (1,))
    monkeypatch.setattr(finetune, "STYLE_SEEDS", (1,))
    monkeypatch.setattr(finetune, "STEPS", 2)
    words = ["finetune", "textual-inversion", "--steps", "1", "--output", str(tmp_path), "--json"]
    words += ["--examples", str(EXAMPLES), "--model", str(BASE)]
    monkeypatch.setattr(sys, "argv", ["pocket", *words])
    main()
    figures = json.loads(capsys.readouterr().out)
    assert figures["colors"].keys() == figures["scorer"].keys() == set(finetune.PROMPTS)
    assert figures["styles_kept"].keys() == set(finetune.STYLE_PROMPTS)
    for name in ("textual-inversion-1", "textual-inversion-1-styles"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
