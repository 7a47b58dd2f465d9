"""What pictures and captions mean for the recipe of a training: some is refused, some remarked on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from atelier_server.core import Recipe
from atelier_server.jobs.records import Warned
from atelier_server.rpc.codec.checks import Checks, shown

_NAMED = 20  # pictures that one remark names
# Prodigy estimates the rate itself; learning_rate is a factor of it.
_PRODIGY_RATES = (0.1, 10.0)


@dataclass(frozen=True, slots=True)
class Received:
    """A picture as it was sent. `twin`: the name of an earlier one that it repeats, if it does."""

    filename: str
    caption: str
    width: int
    height: int
    transparent: bool
    twin: str | None = None


def check_pictures(recipe: Recipe, pictures: Sequence[Received]) -> None:
    """Raises InvalidRequest for pictures and captions with which the recipe cannot be followed."""
    checks = Checks()
    if recipe.validation_split > 0 and sum(picture.twin is None for picture in pictures) == 1:
        checks.refuse(
            "recipe.validation_split",
            f"{recipe.validation_split:g} of a single picture: there is none to hold out and one to learn",
        )
    captions = [picture.caption or recipe.instance_prompt for picture in pictures]
    for i, token in enumerate(recipe.placeholder_tokens):
        if not any(token in caption for caption in captions):
            checks.refuse(
                f"recipe.placeholder_tokens[{i}]",
                f"{shown(token)} is in no caption and not in instance_prompt: it would learn nothing",
            )
    if recipe.output_preservation_weight > 0:
        for i, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            if recipe.instance_prompt not in caption:
                checks.refuse(
                    f"images[{i}].caption",
                    f"{shown(picture.filename)}: output_preservation_weight needs instance_prompt "
                    f"{shown(recipe.instance_prompt)} within the caption {shown(caption)}",
                )
    checks.done()


def remarks(recipe: Recipe, pictures: Sequence[Received]) -> tuple[Warned, ...]:
    """What the user should know and may have meant so."""
    found: list[Warned] = []
    if twins := [f"{shown(p.filename)} as {shown(p.twin)}" for p in pictures if p.twin is not None]:
        found.append(_remark("DUPLICATE_IMAGES", "the same picture and caption again, learned once", twins))
    small = [p for p in pictures if min(p.width, p.height) < recipe.resolution]
    if small:
        sizes = [f"{shown(p.filename)} ({p.width} x {p.height})" for p in small]
        found.append(
            _remark("SMALL_IMAGES", f"smaller than resolution {recipe.resolution}, so scaled up", sizes)
        )
    if recipe.learns_tokens:
        without = [shown(p.filename) for p in pictures if not _any_token(recipe, p)]
        if without:
            text = f"captions without {' or '.join(recipe.placeholder_tokens)} teach no token"
            found.append(_remark("CAPTION_WITHOUT_TOKEN", text, without))
    if recipe.masked_loss and not any(p.transparent for p in pictures):
        found.append(Warned("NO_MASK", "masked_loss is set, but no picture has transparency: all is learned"))
    low, high = _PRODIGY_RATES
    if recipe.optimizer == "prodigy" and not low <= recipe.learning_rate <= high:
        found.append(
            Warned(
                "UNUSUAL_LEARNING_RATE",
                f"prodigy finds its rate; {recipe.learning_rate:g} is a factor of it, usually 1",
            )
        )
    return tuple(found)


def _any_token(recipe: Recipe, picture: Received) -> bool:
    caption = picture.caption or recipe.instance_prompt
    return any(token in caption for token in recipe.placeholder_tokens)


def _remark(reason: str, text: str, names: Iterable[str]) -> Warned:
    listed = list(names)
    more = f" and {len(listed) - _NAMED} more" if len(listed) > _NAMED else ""
    return Warned(reason, f"{text}: {', '.join(listed[:_NAMED])}{more}")
