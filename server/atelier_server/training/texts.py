"""Captions as the U-Net hears them in a training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from atelier_server.adapters.bank import SlotBank
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import TextEmbeds
from atelier_server.training.methods.method import Method


class Texts:
    """Kept while nothing that they come from learns, else heard anew in every micro-step, within its graph.

    A text is heard by itself, with the training's own leaves and words: its bits are its own. `base` is the
    resident one; without `keeps` all are heard anew.
    """

    def __init__(self, base: BaseModel, bank: SlotBank, method: Method, *, keeps: bool = True) -> None:
        self._resident = base
        self._base = method.heard_by or base
        self._keeps = keeps
        self._bank = bank
        self._method = method
        self._kept: dict[str | None, TextEmbeds] = {}
        self._of_base: dict[str | None, TextEmbeds] = {}

    def keep(self, captions: Sequence[str | None]) -> Iterator[None]:
        """Hears them all now, for as long as nothing is forgotten; a forward between two yields."""
        for caption in captions if self._keeps else ():
            if caption not in self._kept:
                self._kept[caption] = self._heard([caption], learning=False)[caption]
                yield

    def forget(self) -> None:
        """They have become something else."""
        self._kept.clear()

    def hear(self, captions: Sequence[str | None], *, learning: bool) -> list[TextEmbeds]:
        """One each; None is a dropped caption: what guidance will later take for no prompt."""
        if learning:
            heard = self._heard(captions, learning=True)
            return [heard[caption] for caption in captions]
        if not self._keeps:
            heard = self._heard(captions, learning=False)
            return [heard[caption] for caption in captions]
        if missing := [caption for caption in captions if caption not in self._kept]:
            self._kept |= self._heard(missing, learning=False)
        return [self._kept[caption] for caption in captions]

    def of_base(self, captions: Sequence[str | None]) -> list[TextEmbeds]:
        """One each, as the base hears it without anything learned."""
        if not self._keeps:
            self._of_base.clear()
        for caption in captions:
            if caption not in self._of_base:
                base = self._resident
                text = base.encode_negative(None) if caption is None else base.encode_caption(caption)
                self._of_base[caption] = text
        return [self._of_base[caption] for caption in captions]

    def tensors(self) -> Iterator[Tensor]:
        """All that is kept."""
        for text in (*self._kept.values(), *self._of_base.values()):
            yield from text.tensors()

    def _heard(self, captions: Sequence[str | None], *, learning: bool) -> dict[str | None, TextEmbeds]:
        words = self._method.words()
        heard: dict[str | None, TextEmbeds] = {}
        with self._bank.train(self._method.text_leaves, words):
            for caption in captions:
                if caption not in heard:
                    heard[caption] = (
                        self._base.encode_negative(None)
                        if caption is None
                        else self._base.encode_caption(caption, words=words.ids)
                    )
        if learning:
            return heard
        return {caption: text.detach() for caption, text in heard.items()}
