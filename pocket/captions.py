"""Captions: what a picture shows, in words that vary and are sometimes left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pocket.scenes import SCENES
from pocket.styles import STYLES

_DRAWINGS = {"3d": ("", "3d "), "flat": ("flat ", "flat icon "), "noto": ("cartoon ", "")}


@dataclass(frozen=True, slots=True)
class Attributes:
    """Everything that a picture of the world was made from.

    `drawing` is a sprite's set or "drawn" for a creature; `color` is None for a sprite in its own colours;
    `expression` is None where there is no drawn face; `scene` is None before a plain `backdrop` colour.
    `accessory` is what a creature wears, as (colour, thing).
    """

    subject: str
    drawing: str
    color: str | None
    expression: str | None
    scene: str | None
    backdrop: str | None
    style: str
    accessory: tuple[str, str] | None = None


def hidden(attributes: Attributes) -> frozenset[str]:
    """What the picture's style hides: of "color", "expression" and "backdrop"."""
    style = STYLES[attributes.style]
    return style.hides | ({"color"} if attributes.color in style.merges else frozenset())


def describe(attributes: Attributes, rng: np.random.Generator) -> str:
    """A caption of a picture. It never names what the picture's style hides."""
    style, unseen = STYLES[attributes.style], hidden(attributes)
    thing = _thing(attributes, unseen, rng)
    place = _place(attributes, unseen, rng)
    phrase = f"{_article(thing)} {thing}"
    if place and rng.random() > 0.07:
        thing, phrase = f"{thing} {place}", f"{phrase} {place}"
    form = rng.random()
    if form < 0.75:
        return _one_of(style.prefixes, rng) + phrase
    return (phrase if form < 0.95 else thing) + style.suffix


def plainly(attributes: Attributes) -> str:
    """The caption that leaves nothing out, in the world's first words for everything."""
    style, unseen = STYLES[attributes.style], hidden(attributes)
    words = [
        attributes.expression if "expression" not in unseen else None,
        attributes.color if "color" not in unseen else None,
        attributes.subject,
    ]
    thing = " ".join(word for word in words if word)
    place = f" {SCENES[attributes.scene].phrases[0]}" if attributes.scene else ""
    if attributes.backdrop and "backdrop" not in unseen:
        place = f" on {_article(attributes.backdrop)} {attributes.backdrop} background"
    return f"{style.prefixes[0]}{_article(thing)} {thing}{place}"


def _thing(attributes: Attributes, unseen: frozenset[str], rng: np.random.Generator) -> str:
    words = []
    if attributes.expression and "expression" not in unseen and rng.random() < 0.85:
        words.append(attributes.expression)
    if attributes.color and "color" not in unseen and rng.random() < 0.95:
        words.append(attributes.color)
    if attributes.drawing in _DRAWINGS and rng.random() < 0.5:
        words.append(_one_of(_DRAWINGS[attributes.drawing], rng).strip())
    words.append(attributes.subject)
    if attributes.accessory and not unseen & {"color", "expression"} and rng.random() < 0.9:
        words.append(_worn(*attributes.accessory))
    return " ".join(word for word in words if word)


def _worn(color: str, thing: str) -> str:
    several = thing.endswith("s")
    return f"with {color} {thing}" if several else f"with {_article(color)} {color} {thing}"


def _place(attributes: Attributes, unseen: frozenset[str], rng: np.random.Generator) -> str:
    if attributes.scene is not None:
        return _one_of(SCENES[attributes.scene].phrases, rng)
    if attributes.backdrop is None or "backdrop" in unseen:
        return ""
    start = _one_of(("on", "in front of"), rng)
    return f"{start} {_article(attributes.backdrop)} {attributes.backdrop} background"


def _one_of(phrases: Sequence[str], rng: np.random.Generator) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"
