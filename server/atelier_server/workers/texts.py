"""Texts as the U-Net hears them, kept: the same words come again with every picture of a request."""

from __future__ import annotations

from collections import OrderedDict

from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import TextEmbeds

_KEPT = 512


class Texts:
    """The least recently used of `_KEPT` texts goes first. One thread: the device's."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._kept: OrderedDict[tuple[str, bool], TextEmbeds] = OrderedDict()

    def prompt(self, text: str) -> TextEmbeds:
        return self._encoded(text, False)

    def negative(self, text: str) -> TextEmbeds:
        return self._encoded(text, True)

    def _encoded(self, text: str, negative: bool) -> TextEmbeds:
        """Its key is all that decides about its bits."""
        key = (text, negative)
        if (embeds := self._kept.get(key)) is None:
            encode = self._base.encode_negative if negative else self._base.encode_prompt
            embeds = self._kept[key] = encode(text)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return embeds
