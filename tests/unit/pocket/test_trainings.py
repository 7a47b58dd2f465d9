"""The trainings: each learns a little in a few tiny steps, and resumes as if it had never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch import distributed as dist

import atelier_server.pocket
from pocket.__main__ import main
from pocket.classifier import Classifier, ClassifierTask
from pocket.data import PictureSet
from pocket.labels import classes_of
from pocket.peers import average_gradients
from pocket.text import TextTask, Towers, build_clip, load_text, text_scores, token_ids, train_tokenizer
from pocket.training import Batch, Budget, Losses, Task, Trainer
from pocket.unet import UnetTask, build_unet, lesson
from pocket.vae import VaeTask, as_tensor, build_vae, decibels, load_vae, reconstructed, widened
from pocket.world import SMALL

BASE = atelier_server.pocket.path()


def _train(task: Task, folder: Path, steps: int, **options: float) -> Trainer:
    budget = Budget(minutes=60, max_steps=steps, warmup_steps=1, report_steps=1, **options)  # type: ignore[arg-type]
    trainer = Trainer(task, folder, budget, lambda _: None)
    trainer.run()
    return trainer


def _learns(task: Task, folder: Path, steps: int, **options: float) -> bool:
    """Whether the loss of the same draws is lower after the training."""

    def loss() -> float:
        with torch.no_grad():
            seeded = [torch.Generator().manual_seed(seed) for seed in range(4)]
            draws = [task.losses(task.batch(generator), generator)["loss"] for generator in seeded]
        return float(torch.stack(draws).mean())

    before = loss()
    _train(task, folder, steps, **options)
    return loss() < before


class Line:
    """Fits a line to random points: the smallest task."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.network: nn.Module = nn.Linear(2, 1)

    def rates(self) -> list[tuple[float, list[nn.Parameter]]]:
        return [(1.0, list(self.network.parameters()))]

    def batch(self, generator: torch.Generator) -> Batch:
        return {"x": torch.randn(8, 2, generator=generator)}

    def losses(self, batch: Batch, generator: torch.Generator) -> Losses:
        x = batch["x"] + 0.01 * torch.randn(8, 2, generator=generator)
        return {"loss": ((self.network(x) - x.sum(1, keepdim=True)) ** 2).mean()}


def _weights(trainer: Trainer) -> Tensor:
    return torch.cat([p.flatten() for p in trainer.task.network.parameters()])


def test_a_training_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _train(Line(), tmp_path / "whole", 12)
    # The first half of the same plan: stopped by an interruption at step 5.
    interrupted = Line()
    budget = Budget(minutes=60, max_steps=12, warmup_steps=1, report_steps=1, save_seconds=-1)
    stops = Trainer(interrupted, tmp_path / "half", budget, _stop_at("step 5 "))
    with pytest.raises(KeyboardInterrupt):
        stops.run()
    reports: list[str] = []
    resumed = Trainer(Line(), tmp_path / "half", budget, reports.append)
    resumed.run()
    assert reports[0] == "resumed at step 4"
    assert torch.equal(_weights(resumed), _weights(whole))


def test_batches_drawn_by_other_processes_are_the_same(tmp_path: Path) -> None:
    alone = _train(Line(), tmp_path / "alone", 7)
    helped = _train(Line(), tmp_path / "helped", 7, workers=2)
    assert torch.equal(_weights(helped), _weights(alone))


def _stop_at(start: str) -> Callable[[str], None]:
    def report(line: str) -> None:
        if line.startswith(start):
            raise KeyboardInterrupt

    return report


def test_a_finished_training_is_not_trained_again(tmp_path: Path) -> None:
    first = _train(Line(), tmp_path, 3)
    again = _train(Line(), tmp_path, 3)
    assert again.progress.step == 3
    assert torch.equal(_weights(again), _weights(first))


def test_a_loss_that_is_no_number_stops_the_training(tmp_path: Path) -> None:
    task = Line()
    task.losses = lambda batch, generator: {"loss": torch.full((), torch.nan, requires_grad=True)}  # type: ignore[method-assign]
    with pytest.raises(FloatingPointError, match="the loss of step 0 is nan"):
        _train(task, tmp_path, 3)


def test_the_vae_learns(tiny_set: PictureSet, tmp_path: Path) -> None:
    vae = build_vae((8, 16))
    assert _learns(VaeTask(vae, tiny_set.pixels, batch_size=4), tmp_path, 12, learning_rate=3e-3)


def test_a_frozen_encoder_stays(tiny_set: PictureSet, tmp_path: Path) -> None:
    vae = build_vae((8, 16))
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    _train(VaeTask(vae, tiny_set.pixels, encoder_rate=0.0, batch_size=2), tmp_path, 2)
    changed = {
        name.split(".")[0] for name, value in vae.state_dict().items() if not value.equal(before[name])
    }
    assert changed == {"decoder", "post_quant_conv"}


def test_a_widened_vae_computes_the_same(tiny_set: PictureSet) -> None:
    narrow = build_vae((8, 16)).eval()
    wide = widened(narrow, (12, 24)).eval()
    pixels = as_tensor(tiny_set.pixels[:4])
    assert torch.allclose(reconstructed(narrow, pixels), reconstructed(wide, pixels), atol=1e-4)
    assert wide.config.block_out_channels == (12, 24)


def test_decibels() -> None:
    pixels = torch.zeros(2, 3, 4, 4)
    assert decibels(pixels, pixels + 0.02) == pytest.approx(40.0)


def test_text_and_images_learn_together(tiny_set: PictureSet, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(tiny_set.captions, length=24)
    towers = Towers(build_clip(tokenizer, width=32, layers=1), classes_of(SMALL))
    task = TextTask(towers, tiny_set, tokenizer, batch_size=16)
    assert _learns(task, tmp_path, 10, learning_rate=3e-3)
    scores = text_scores(towers, tiny_set, tokenizer)
    assert {"seen subject", "read subject", "seen expression"} <= set(scores)


def test_the_tokenizer_has_clips_layout(tiny_set: PictureSet) -> None:
    tokenizer = train_tokenizer(tiny_set.captions, length=24)
    ids = token_ids(tokenizer, ["A red octopus", ""])
    assert ids.shape == (2, 24)
    assert ids[1, 0] == ids[0, 0] == tokenizer.bos_token_id == len(tokenizer) - 2
    assert ids[1, 1] == ids[0, -1] == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "a red octopus"
    # A word of the captions is one token; one never seen is pieces, none of them unknown.
    assert len(tokenizer.tokenize("octopus")) == 1
    assert tokenizer.unk_token not in tokenizer.tokenize("zwx")


def test_a_warm_clip_begins_at_the_models_text_encoder() -> None:
    tokenizer, text_encoder = load_text(BASE)
    clip = build_clip(tokenizer, like=text_encoder)
    ids = token_ids(tokenizer, ["a red octopus on a beach"])
    with torch.no_grad():
        assert torch.equal(clip.text_model(input_ids=ids)[0], text_encoder(ids)[0])


def test_only_the_decoder_learns_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The latents that the base's U-Net knows stay as they are, bit for bit."""
    words = "vae --decoder-only --minutes 9 --max-steps 1 --pictures 40 --held-out 8 --below-gate --json"
    argv = ["pocket", *words.split(), "--from", str(BASE), "--work", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    main()
    assert json.loads(capsys.readouterr().out)["db"] > 20
    base, taught = load_vae(BASE), load_vae(tmp_path / "vae")
    known = taught.state_dict()
    changed = {
        name.split(".")[0] for name, value in base.state_dict().items() if not value.equal(known[name])
    }
    assert changed == {"decoder", "post_quant_conv"}
    assert taught.config.scaling_factor == base.config.scaling_factor


@pytest.mark.parametrize("text_rate", [0.0, 0.5])
def test_the_unet_learns_and_the_text_encoder_in_phase_2(
    tiny_set: PictureSet, tmp_path: Path, text_rate: float
) -> None:
    tokenizer, text_encoder = load_text(BASE)
    before = text_encoder.state_dict()["embeddings.token_embedding.weight"].clone()
    taught = lesson(tiny_set, load_vae(BASE), tokenizer)
    assert (taught.latents.shape, len(taught.attributes)) == ((48, 4, 16, 16), 48)
    assert taught.latents.float().std() == pytest.approx(1, abs=0.15)
    task = UnetTask(build_unet(128, (16, 32)), text_encoder, taught, text_rate=text_rate, batch_size=8)
    assert _learns(task, tmp_path, 12, learning_rate=3e-3)
    after = text_encoder.state_dict()["embeddings.token_embedding.weight"]
    assert before.equal(after) == (text_rate == 0)


def test_the_classifier_learns(tiny_set: PictureSet, tmp_path: Path) -> None:
    task = ClassifierTask(Classifier(classes_of(SMALL), (8, 16)), tiny_set, batch_size=16)
    assert _learns(task, tmp_path, 10, learning_rate=3e-3)


def test_two_processes_train_one_network(tmp_path: Path) -> None:
    words = "--minutes 9 --max-steps 2 --pictures 140 --held-out 4 --below-gate --json --work"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    command = (*launcher, "-m", "pocket", "scorer", "--from", str(BASE), *words.split(), str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)["scores"]) == set(classes_of(SMALL))  # of one process, not of both
    with safe_open(tmp_path / "scoring" / "state.safetensors", "pt") as state:
        assert json.loads(state.metadata()["progress"])["step"] == 2
    assert (tmp_path / "scorer" / "model.safetensors").exists()


def test_gradients_are_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda flat: flat.add_(1.0))
    weight, idle = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(3))
    weight.grad = torch.full((2, 2), 5.0)
    average_gradients([weight, idle])
    assert weight.grad.eq(3.0).all()
    assert idle.grad is not None
    assert idle.grad.eq(0.5).all()
