"""What can be asked about a picture: its attributes as classes.

What a picture does not show (the colour of a sketch, the expression of a tree, the colour of a sprite left as
it is) is NOT_SHOWN, which torch's cross entropy ignores.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocket.canvas import COLORS
from pocket.captions import Attributes, hidden
from pocket.creatures import EXPRESSIONS
from pocket.data import PictureSet
from pocket.scenes import SCENES
from pocket.styles import STYLES
from pocket.world import Part

Classes = dict[str, tuple[str, ...]]
Answers = dict[str, str | None]
NOT_SHOWN = -100
_AS_DRAWN = "as drawn"  # a photo of the world is the world


def classes_of(part: Part) -> Classes:
    """Every question with its possible answers."""
    backdrops = tuple(f"plain {color}" for color in COLORS)
    styles = tuple(style for style in STYLES if style not in ("none", "photo"))
    return {
        "subject": part.subjects,
        "color": tuple(COLORS),
        "background": (*SCENES, *backdrops),
        "style": (_AS_DRAWN, *styles),
        "expression": EXPRESSIONS,
    }


def answers(attributes: Attributes) -> Answers:
    """The true answer to each question, None where the picture does not show it."""
    unseen = hidden(attributes)
    background = attributes.scene or f"plain {attributes.backdrop}"
    return {
        "subject": attributes.subject,
        "color": None if "color" in unseen else attributes.color,
        "background": None if attributes.backdrop and "backdrop" in unseen else background,
        "style": _AS_DRAWN if attributes.style in ("none", "photo") else attributes.style,
        "expression": None if "expression" in unseen else attributes.expression,
    }


def exchanged(attributes: Attributes, question: str, answer: str) -> Attributes:
    """The same attributes with another answer to one question."""
    if question == "background":
        color = answer.removeprefix("plain ")
        plain = color != answer
        return replace(attributes, scene=None if plain else answer, backdrop=color if plain else None)
    if question == "style":
        return replace(attributes, style="none" if answer == _AS_DRAWN else answer)
    return replace(attributes, **{question: answer})  # type: ignore[arg-type]


def mistaken(attributes: Attributes, classes: Classes, rng: np.random.Generator) -> Attributes:
    """The attributes with one answer that is wrong, of those that the picture shows."""
    shown = [(question, answer) for question, answer in answers(attributes).items() if answer is not None]
    question, right = shown[rng.integers(len(shown))]
    wrong = [answer for answer in classes[question] if answer != right]
    return exchanged(attributes, question, wrong[rng.integers(len(wrong))])


def named(attributes: Attributes, caption: str) -> Answers:
    """The answers that a caption of the picture gives: captions leave words out."""
    shown = answers(attributes)
    told = {
        "subject": True,
        "color": bool(re.search(rf"\b{attributes.color} (\w+ ){{0,2}}{attributes.subject}\b", caption)),
        "background": _tells_background(attributes, caption),
        "style": True,
        "expression": attributes.expression is not None and attributes.expression in caption.split(),
    }
    return {question: answer if told[question] else None for question, answer in shown.items()}


def _tells_background(attributes: Attributes, caption: str) -> bool:
    if attributes.scene is None:
        return f"{attributes.backdrop} background" in caption
    return any(phrase in caption for phrase in SCENES[attributes.scene].phrases)


def shown_labels(pictures: PictureSet, classes: Classes) -> dict[str, Tensor]:
    """What each picture shows, as class numbers: question -> [n]."""
    return class_numbers([answers(shown) for shown in pictures.attributes], classes)


def told_labels(pictures: PictureSet, classes: Classes) -> dict[str, Tensor]:
    """What each caption tells, as class numbers: question -> [n]."""
    pairs = zip(pictures.attributes, pictures.captions, strict=True)
    return class_numbers([named(shown, caption) for shown, caption in pairs], classes)


def class_numbers(given: Sequence[Answers], classes: Classes) -> dict[str, Tensor]:
    """Answers as class numbers, NOT_SHOWN for None: question -> [n]."""
    return {
        question: torch.tensor(
            [NOT_SHOWN if (told := entry[question]) is None else possible.index(told) for entry in given]
        )
        for question, possible in classes.items()
    }


def build_heads(width: int, classes: Classes) -> nn.ModuleDict:
    """A linear answer to each question, from an embedding of `width`."""
    return nn.ModuleDict({question: nn.Linear(width, len(found)) for question, found in classes.items()})


def question_loss(heads: nn.ModuleDict, embedded: Tensor, labels: dict[str, Tensor]) -> Tensor:
    """Cross entropy summed over the questions; `labels` [b] each, in the order of `embedded` [b, d]."""
    losses = []
    for question, head in heads.items():
        right = labels[question].to(embedded.device)
        asked = (right != NOT_SHOWN).sum().clamp_min(1)
        total = F.cross_entropy(head(embedded), right, ignore_index=NOT_SHOWN, reduction="sum")
        losses.append(total / asked)
    return torch.stack(losses).sum()


@torch.no_grad()
def shares_right(
    heads: nn.ModuleDict, embedded: Tensor, labels: dict[str, Tensor]
) -> dict[str, tuple[float, int]]:
    """Right answers by question, as (share, how many were asked); (nan, 0) where nothing was asked."""
    shares = {}
    for question, head in heads.items():
        right = labels[question]
        asked = right != NOT_SHOWN
        hits = head(embedded).argmax(1).cpu()[asked] == right[asked]
        shares[question] = (float(hits.float().mean()), int(asked.sum()))
    return shares
