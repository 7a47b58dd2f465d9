"""The workshop's stages, one after the other: text, vae, unet, scorer, evaluate; each in its part of the work
folder.

A stage whose result stays below its gate says so in its figures ("gate": false); its command then ends with
an error unless it was told to go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from pocket import classifier as judge
from pocket import scorer, text, vae
from pocket.classifier import Classifier, ClassifierTask
from pocket.data import PARTS, PictureSet, SetRecipe, picture_set
from pocket.evaluate import evaluate, first
from pocket.labels import classes_of
from pocket.model import save_model, size_mb
from pocket.painting import STEPS
from pocket.peers import count, rank, wait
from pocket.scorer import Scorer, save_scorer, zero_shot
from pocket.text import TextTask, Towers, build_clip, load_text, save_towers, text_scores, train_tokenizer
from pocket.training import Budget, Report, Trainer
from pocket.unet import UnetTask, build_unet, lesson, load_unet
from pocket.vae import (
    VaeTask,
    as_tensor,
    build_vae,
    decibels,
    load_vae,
    reconstructed,
    set_scaling_factor,
    widened,
)

Figures = dict[str, object]
_PEER: Figures = {"gate": True}  # of a process that only helps to train
_ASKED = 512  # pictures that the scorer is asked about: each stands beside every answer
_HELD_OUT = 900_000  # added to a seed: worlds that no training sees


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to work, what to start from and how much to spend. `base` is a model's folder or None."""

    work: Path
    base: Path | None = None
    decoder_only: bool = False  # of the VAE: latents, and so the U-Net, stay valid
    minutes: float = 20.0
    max_steps: int = 10**9
    part: str = "small"
    pictures: int = 16384
    held_out: int = 1024
    workers: int = 1
    batch_scale: int = 1  # how many times the batches of a CPU
    learning_rate: float | None = None  # instead of the stage's own
    painted: int = 256
    sampling_steps: int = STEPS
    seed: int = 21

    def training_set(self) -> PictureSet:
        return self.drawn(SetRecipe(self.part, self.seed, self.pictures))

    def unseen_set(self) -> PictureSet:
        return self.drawn(SetRecipe(self.part, self.seed + _HELD_OUT, self.held_out))

    def drawn(self, recipe: SetRecipe) -> PictureSet:
        """A set in the work folder; process 0 draws it if it is missing; every process must ask."""
        if rank() == 0:
            picture_set(recipe, self.work / "sets", self.workers)
        wait()
        return picture_set(recipe, self.work / "sets")

    def budget(self, learning_rate: float, share: float = 1.0) -> Budget:
        """A share of what there is to spend, at the stage's own learning rate unless the plan has another."""
        return Budget(
            minutes=self.minutes * share,
            max_steps=max(1, int(self.max_steps * share)),
            learning_rate=self.learning_rate or learning_rate,
            workers=self.workers if self.workers > 1 else 0,
        )


def make_text(plan: Plan, report: Report) -> Figures:
    """Tokenizer and text encoder in WORK/text. Warm: the base's tokenizer and text encoder."""
    pictures, unseen, home = plan.training_set(), plan.unseen_set(), plan.work / "text"
    if plan.base is None:
        tokenizer = train_tokenizer(pictures.captions)
        clip = build_clip(tokenizer)
    else:
        tokenizer, text_encoder = load_text(plan.base)
        clip = build_clip(tokenizer, like=text_encoder)
    towers = Towers(clip, classes_of(PARTS[plan.part]))
    task = TextTask(towers, pictures, tokenizer, batch_size=128 * plan.batch_scale)
    Trainer(task, home, plan.budget(1e-3), report).run()
    if rank():
        return _PEER
    tokenizer.save_pretrained(home / "tokenizer")
    save_towers(towers, home)
    scores = text_scores(towers, unseen, tokenizer)
    return {"scores": scores, "gate": min(scores.values()) >= text.GATE}


def make_vae(plan: Plan, report: Report) -> Figures:
    """The VAE in WORK/vae, taught by the whole world whatever part the U-Net is taught. Warm: the base's,
    widened if it is narrower, and wholly or only its decoder."""
    recipe = SetRecipe("whole", plan.seed - 1, min(8192, max(64, plan.pictures // 4)), 128)
    pixels, held_out = plan.drawn(recipe).pixels, plan.unseen_set().pixels
    taught = build_vae() if plan.base is None else _warm_vae(plan.base)
    rate = 0.0 if plan.decoder_only else 1.0
    task = VaeTask(taught, pixels, encoder_rate=rate, batch_size=16 * plan.batch_scale)
    Trainer(task, plan.work / "vae", plan.budget(1.2e-3), report).run()
    if rank():
        return _PEER
    if not plan.decoder_only:
        set_scaling_factor(taught, pixels[:512, ::2, ::2])
    taught.save_pretrained(plan.work / "vae" / "vae")
    unseen = as_tensor(held_out)
    value = decibels(unseen, reconstructed(taught, unseen))
    return {"db": value, "gate": value >= vae.GATE_DB}


def make_unet(plan: Plan, report: Report) -> Figures:
    """The U-Net in WORK/unet and the whole model in WORK/model.

    Cold, a third of the budget is phase 1; warm, the text encoder learns along from the start.
    """
    tokenizer, text_encoder = _made_text(plan)
    made = _made_vae(plan)
    unet = build_unet(text_encoder.config.hidden_size) if plan.base is None else load_unet(plan.base)
    taught = lesson(plan.training_set(), made, tokenizer)
    home, size = plan.work / "unet", 32 * plan.batch_scale
    if plan.base is None:
        frozen = UnetTask(unet, text_encoder, taught, text_rate=0.0, batch_size=size)
        Trainer(frozen, home / "phase1", plan.budget(1e-3, 1 / 3), report).run()
    task = UnetTask(unet, text_encoder, taught, batch_size=size)
    trainer = Trainer(task, home / "phase2", plan.budget(7e-4, 1.0 if plan.base else 2 / 3), report)
    trainer.run()
    if rank():
        return _PEER
    save_model(plan.work / "model", vae=made, unet=unet, text_encoder=text_encoder, tokenizer=tokenizer)
    return {"progress": asdict(trainer.progress), "size_mb": size_mb(plan.work / "model"), "gate": True}


def make_scorer(plan: Plan, report: Report) -> Figures:
    """The scorer in the model's folder, WORK/model/scorer, or in WORK/scorer where no model was made. It
    begins at what make_text left; without it, at the base's scorer; without that, its text half at the text
    encoder."""
    pictures, unseen = plan.training_set(), plan.unseen_set()
    towers, tokenizer = _scoring_towers(plan)
    classes, size = towers.classes, 64 * plan.batch_scale // count()
    task = TextTask(towers, pictures, tokenizer, text_rate=0.3, batch_size=size)
    Trainer(task, plan.work / "scoring", plan.budget(1.5e-3), report).run()
    if rank():
        return _PEER
    home = _scorer_home(plan)
    save_scorer(towers.clip, tokenizer, home)
    asked = zero_shot(Scorer(home), first(unseen, _ASKED), classes)
    scores = {question: share for question, (share, _) in asked.items()}
    return {"scores": scores, "size_mb": size_mb(home), "gate": min(scores.values()) >= scorer.GATE}


def make_evaluation(plan: Plan, report: Report) -> Figures:
    """Trains the classifier in WORK/classifier if it is not there, then judges WORK/model, or the base where
    nothing was trained, into WORK/evaluation."""
    pictures, unseen = plan.training_set(), plan.unseen_set()
    judging = _classifier(plan, pictures, report)
    if rank():
        return _PEER
    model, scoring = _made_model(plan), _scorer_home(plan)
    if not scoring.exists():
        scoring = model / "scorer"
    result = evaluate(
        model,
        judging,
        unseen,
        pictures,
        plan.work / "evaluation",
        scorer=Scorer(scoring) if scoring.exists() else None,
        count=plan.painted,
        steps=plan.sampling_steps,
    )
    trusted = min(result.classifier_on_true.values()) >= judge.GATE
    return {**asdict(result), "gate": trusted and passes(result.generated)}


def passes(generated: dict[str, float]) -> bool:
    """Whether generated pictures reach what the project asks of a model made on CPUs."""
    return generated["subject"] >= 0.6


STAGES: dict[str, Callable[[Plan, Report], Figures]] = {
    "text": make_text,
    "vae": make_vae,
    "unet": make_unet,
    "scorer": make_scorer,
    "evaluate": make_evaluation,
}


def _made_model(plan: Plan) -> Path:
    """What make_unet left, or the base."""
    made = plan.work / "model"
    return made if made.exists() or plan.base is None else plan.base


def _scorer_home(plan: Plan) -> Path:
    made = plan.work / "model"
    return made / "scorer" if made.exists() else plan.work / "scorer"


def _made_text(plan: Plan) -> tuple[CLIPTokenizer, CLIPTextModel]:
    """What make_text left; a warm plan may do without it and takes the base's."""
    made = plan.work / "text"
    if plan.base is not None and not (made / "text_encoder").exists():
        return load_text(plan.base)
    return load_text(made)


def _scoring_towers(plan: Plan) -> tuple[Towers, CLIPTokenizer]:
    made, classes = plan.work / "text", classes_of(PARTS[plan.part])
    if (made / "clip").exists():
        clip = CLIPModel.from_pretrained(made / "clip", dtype=torch.float32)
        return Towers(clip, classes), CLIPTokenizer.from_pretrained(made / "tokenizer")
    if plan.base is not None and (warm := plan.base / "scorer").exists():
        clip = CLIPModel.from_pretrained(warm, dtype=torch.float32)
        return Towers(clip, classes), CLIPTokenizer.from_pretrained(warm)
    tokenizer, text_encoder = load_text(_made_model(plan))
    return Towers(build_clip(tokenizer, like=text_encoder), classes), tokenizer


def _made_vae(plan: Plan) -> AutoencoderKL:
    """What make_vae left, or the base's."""
    made = plan.work / "vae"
    return load_vae(plan.base if plan.base is not None and not (made / "vae").exists() else made)


def _warm_vae(base: Path) -> AutoencoderKL:
    warm = load_vae(base)
    narrower = tuple(warm.config.block_out_channels) != vae.CHANNELS
    return widened(warm) if narrower else warm


def _classifier(plan: Plan, pictures: PictureSet, report: Report) -> Classifier:
    judging = Classifier(classes_of(PARTS[plan.part]))
    task = ClassifierTask(judging, pictures, batch_size=64 * plan.batch_scale)
    Trainer(task, plan.work / "classifier", plan.budget(2e-3), report).run()
    return judging
