"""Texts as the U-Net hears them, kept: the same words come again with every picture of a request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from atelier_server.adapters.bank import SlotBank
from atelier_server.core import AdapterUse, GenerationJob
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.conditioning import TextEmbeds
from atelier_server.errors import InvalidRequest, Violation

_KEPT = 512
Loaded = Sequence[tuple[AdapterUse, int]]
"""A picture's adapters, and the slots in which they lie."""
# The text, whether it is a negative one, the layers left out, and contents and weights of the adapters that
# change it.
_Key = tuple[str | None, bool, int, tuple[tuple[str, float], ...]]


class Texts:
    """The least recently used of `_KEPT` texts goes first. One thread: the device's."""

    def __init__(self, base: BaseModel, bank: SlotBank) -> None:
        self._base = base
        self._bank = bank
        self._encoders = base.family.text_encoders
        self._kept: OrderedDict[_Key, TextEmbeds] = OrderedDict()

    def pair(self, job: GenerationJob, adapters: Loaded) -> tuple[TextEmbeds, TextEmbeds | None]:
        """A picture's prompt, and its negative prompt if it is guided: of one length, the U-Net hears both.

        Raises AdapterMismatch where two adapters have the same word, InvalidRequest for a text too long.
        """
        prompt = self.prompt(job.prompt, adapters, job.clip_skip)
        if not job.guided:
            return prompt, None
        # As diffusers' pipelines have it: the negative prompt is heard to the last layer.
        negative = self.negative(job.negative_prompt, adapters)
        empty = None if job.negative_prompt is None else ""
        length = max(len(prompt.states), len(negative.states))
        return (
            prompt.lengthened(length, self.prompt("", adapters, job.clip_skip)),
            negative.lengthened(length, self.negative(empty, adapters)),
        )

    def prompt(self, text: str, adapters: Loaded = (), clip_skip: int = 0) -> TextEmbeds:
        """With the adapters' changes of the text encoders, and their words."""
        return self._get(text, adapters, clip_skip, negative=False)

    def negative(self, text: str | None, adapters: Loaded = ()) -> TextEmbeds:
        """None: there is none, which is not to all bases an empty one."""
        return self._get(text, adapters, 0, negative=True)

    def _get(self, text: str | None, adapters: Loaded, clip_skip: int, *, negative: bool) -> TextEmbeds:
        heard = [(use, slot) for use, slot in adapters if self._bank.changes(slot, self._encoders)]
        # By content, not by slot: it stays the same when an adapter has been out and comes in again.
        key = (text, negative, clip_skip, tuple(sorted((use.sha256, use.weight) for use, _ in heard)))
        if (embeds := self._kept.get(key)) is None:
            row = [(slot, use.weight) for use, slot in heard]
            embeds = self._kept[key] = self._encoded(text, row, negative, clip_skip)
        self._kept.move_to_end(key)
        while len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return embeds

    def _encoded(
        self, text: str | None, row: list[tuple[int, float]], negative: bool, clip_skip: int
    ) -> TextEmbeds:
        words = self._bank.words(row)
        with self._bank.use(self._bank.gather([row], self._encoders) if row else None, words):
            try:
                if negative or text is None:
                    return self._base.encode_negative(text, words=words.ids)
                return self._base.encode_prompt(text, clip_skip=clip_skip, words=words.ids)
            except ValueError as error:
                field = "negative_prompt" if negative else "prompt"
                raise InvalidRequest.of([Violation(field, str(error))]) from error
