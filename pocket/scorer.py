"""The scorer: a small CLIP of pocket's world, which tells how alike pictures and words, or two pictures, are.

Its text half begins as a copy of the model's text encoder and learns along; the model's own is left alone.
The gate is 90 % on every question about unseen pictures, answered by captions alone (zero-shot): of captions
that differ in that one answer, the right one must lie nearest.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from pocket.captions import plainly
from pocket.data import PictureSet
from pocket.labels import Classes, answers, exchanged
from pocket.model import clean
from pocket.training import device

GATE = 0.9
_SIDE = 64


class Scorer:
    """A folder of CLIPModel's layout, in use. Pictures may have any size; all methods give float64 arrays."""

    def __init__(self, folder: Path) -> None:
        self._clip = CLIPModel.from_pretrained(folder).eval().to(device())
        self._processor = CLIPProcessor.from_pretrained(folder)

    def image_similarity(
        self, pictures: Sequence[Image.Image], references: Sequence[Image.Image]
    ) -> NDArray[np.float64]:
        """For each picture the mean cosine (-1..1) to the references: [n]."""
        cosines = self.embed_images(pictures) @ self.embed_images(references).T
        return np.asarray(cosines.double().mean(1))

    def text_similarity(
        self, pictures: Sequence[Image.Image], captions: Sequence[str]
    ) -> NDArray[np.float64]:
        """For each picture the cosine (-1..1) to the caption beside it: [n]."""
        if len(pictures) != len(captions):
            raise ValueError(f"{len(pictures)} pictures and {len(captions)} captions: each picture needs one")
        cosines = (self.embed_images(pictures) * self.embed_texts(captions)).sum(1)
        return np.asarray(cosines.double())

    @torch.no_grad()
    def embed_images(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Embeddings of length 1: [n, d]."""
        pixels = self._processor(images=list(pictures), return_tensors="pt")["pixel_values"]
        parts = pixels.to(device()).split(128)
        found = [self._clip.get_image_features(pixel_values=part).pooler_output for part in parts]
        return F.normalize(torch.cat(found), dim=-1).cpu()

    @torch.no_grad()
    def embed_texts(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of length 1: [n, d]."""
        words = self._processor(text=list(captions), return_tensors="pt", padding=True, truncation=True)
        parts = words["input_ids"].to(device()).split(256)
        found = [self._clip.get_text_features(input_ids=part).pooler_output for part in parts]
        return F.normalize(torch.cat(found), dim=-1).cpu()


def save_scorer(clip: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Writes what CLIPModel and CLIPProcessor load: weights in half precision, tokenizer, image processor."""
    half = copy.deepcopy(clip).to("cpu", torch.float16)
    half.save_pretrained(folder)
    square = {"height": _SIDE, "width": _SIDE}
    images = CLIPImageProcessorPil(
        size={"shortest_edge": _SIDE},
        crop_size=square,
        resample=Image.Resampling.BOX,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    clean(folder)


def zero_shot(scorer: Scorer, pictures: PictureSet, classes: Classes) -> dict[str, tuple[float, int]]:
    """Right answers by question, as (share, how many were asked)."""
    images = scorer.embed_images([Image.fromarray(pixels) for pixels in pictures.pixels])
    shares = {}
    for question, possible in classes.items():
        asked = [
            (number, facts, possible.index(right))
            for number, facts in enumerate(pictures.attributes)
            if (right := answers(facts)[question]) is not None
        ]
        captions = [
            plainly(exchanged(facts, question, answer)) for _, facts, _ in asked for answer in possible
        ]
        words = list(dict.fromkeys(captions))
        known = dict(zip(words, scorer.embed_texts(words), strict=True))
        texts = torch.stack([known[caption] for caption in captions]).view(len(asked), len(possible), -1)
        seen = images[[number for number, _, _ in asked]]
        found = torch.einsum("nd,nkd->nk", seen, texts).argmax(1)
        hits = found == torch.tensor([right for _, _, right in asked])
        shares[question] = (float(hits.float().mean()), len(asked))
    return shares
