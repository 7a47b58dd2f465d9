"""Is a model any good? A classifier's answers about generated pictures, CLIP score, copies, sheets.

The classifier's own accuracy on true pictures comes first: no score counts for more than that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pocket.classifier import Classifier, classifier_scores
from pocket.data import PictureSet, Pixels
from pocket.labels import shown_labels, told_labels
from pocket.painting import GUIDANCE, SHEET_PROMPTS, STEPS, load_pipeline, paint, sheet
from pocket.scorer import Scorer
from pocket.training import device
from pocket.vae import as_tensor, decibels, reconstructed

_FIRST_SEED = 5000
_SIDE = 16  # pixels: copies are looked for among pictures this small


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A model's figures. Shares are 0..1; `asked` says how many pictures each stands on.

    `copies` is the share of generated pictures that lie nearer to a training picture than all but 1 % of
    unseen true pictures do: 0.01 is what chance would give.
    """

    classifier_on_true: dict[str, float]
    generated: dict[str, float]
    asked: dict[str, int]
    vae_db: float
    clip_score: float | None
    clip_score_true: float | None
    copies: float
    steps: int
    guidance: float


def evaluate(
    model: Path,
    classifier: Classifier,
    held_out: PictureSet,
    trained_on: PictureSet,
    output: Path,
    *,
    scorer: Scorer | None = None,
    count: int = 256,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> Evaluation:
    """Paints `count` held-out captions and the sheet's prompts with the model in `model`; writes
    `output`/evaluation.json, sheet.png and generated.png (the first 64)."""
    output.mkdir(parents=True, exist_ok=True)
    pipeline = load_pipeline(model)
    prompts, asked_of = list(held_out.captions[:count]), first(held_out, count)
    painted = paint(
        pipeline, prompts, range(_FIRST_SEED, _FIRST_SEED + count), steps=steps, guidance=guidance
    )
    labels = told_labels(asked_of, classifier.classes)
    found = classifier_scores(classifier, painted, labels)
    true = classifier_scores(classifier, held_out.pixels, shown_labels(held_out, classifier.classes))
    unseen = as_tensor(held_out.pixels[:256])
    scores: list[float | None] = [None, None]
    if scorer is not None:
        scores = [
            float(scorer.text_similarity([Image.fromarray(shown) for shown in pixels], prompts).mean())
            for pixels in (painted, asked_of.pixels)
        ]
    result = Evaluation(
        classifier_on_true={question: share for question, (share, _) in true.items()},
        generated={question: share for question, (share, _) in found.items()},
        asked={question: number for question, (_, number) in found.items()},
        vae_db=decibels(unseen, reconstructed(pipeline.vae, unseen)),
        clip_score=scores[0],
        clip_score_true=scores[1],
        copies=copies(painted, held_out.pixels, trained_on.pixels),
        steps=steps,
        guidance=guidance,
    )
    text = json.dumps(asdict(result), indent=1)
    (output / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    sheet(painted[:64], columns=16).save(output / "generated.png")
    write_sheet(pipeline, output / "sheet.png", steps=steps, guidance=guidance)
    return result


def first(pictures: PictureSet, count: int) -> PictureSet:
    """The first pictures of a set."""
    return PictureSet(pictures.pixels[:count], pictures.captions[:count], pictures.attributes[:count])


def copies(painted: Pixels, unseen: Pixels, trained_on: Pixels) -> float:
    """The share of painted pictures that are as good as copied: see Evaluation."""
    known = _small(trained_on)
    limit = torch.quantile(_nearest(_small(unseen), known), 0.01)
    return float((_nearest(_small(painted), known) < limit).float().mean())


def write_sheet(
    pipeline: StableDiffusionPipeline,
    path: Path,
    *,
    seeds: Sequence[int] = (3, 4),
    steps: int = STEPS,
    guidance: float = GUIDANCE,
) -> None:
    """Saves the sheet's prompts, painted from each seed."""
    rows = [
        paint(pipeline, SHEET_PROMPTS, [seed] * len(SHEET_PROMPTS), steps=steps, guidance=guidance)
        for seed in seeds
    ]
    sheet(np.concatenate(rows)).save(path)


def _small(pixels: Pixels) -> Tensor:
    """uint8 [n, h, w, 3] -> [n, 768], averaged down."""
    blocks = [
        F.adaptive_avg_pool2d(as_tensor(pixels[i : i + 512], device()), _SIDE)
        for i in range(0, len(pixels), 512)
    ]
    return torch.cat(blocks).flatten(1)


def _nearest(pictures: Tensor, known: Tensor) -> Tensor:
    """The distance of each picture to the nearest known one: [n]."""
    return torch.stack([torch.cdist(picture[None], known).min() for picture in pictures])
