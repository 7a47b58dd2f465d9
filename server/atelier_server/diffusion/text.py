"""A text encoder with its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

WordIds = Mapping[str, Sequence[int]]
"""Ids of learned tokens by placeholder; what they stand for is known to whoever wrapped the encoder."""


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """What a text encoder makes of one text: the states after each layer [tokens, dim], the last one first.

    None of them is normalised. `projected` [dim] is the whole text's, of encoders with a projection.
    """

    states: tuple[Tensor, ...]
    projected: Tensor | None


class TextEncoder:
    """CLIP's text model, or OpenCLIP's under the same classes of transformers. Always a batch of one text."""

    def __init__(self, name: str, model: Any, tokenizer: Any) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens: int = tokenizer.model_max_length

    def tokenize(self, text: str, words: WordIds | None = None) -> Tensor:
        """Token ids [1, max_tokens] of a text with begin, end and padding; what does not fit is cut off."""
        return self.framed(self.ids(text, words))

    def ids(self, text: str, words: WordIds | None = None) -> list[int]:
        """Token ids of a text alone, however long it is. Its learned `words` get theirs."""
        if not words:
            return self._plain(text)
        # Split off what no tokenizer knows; the pieces in between are as they would be with a blank there.
        pieces = _splitter(tuple(words)).split(text)
        return [i for piece in pieces for i in (words[piece] if piece in words else self._plain(piece))]

    def framed(self, ids: Sequence[int]) -> Tensor:
        """[1, max_tokens] of ids with begin, end and padding; what does not fit is cut off."""
        tokenizer = self.tokenizer
        kept = [tokenizer.bos_token_id, *ids[: self.max_tokens - 2], tokenizer.eos_token_id]
        return torch.tensor([kept + [tokenizer.pad_token_id] * (self.max_tokens - len(kept))])

    def encode(self, ids: Tensor) -> Encoded:
        """Of ids [1, tokens]. With gradients of what a training learns in it, if one is active."""
        output = self.model(ids.to(self.model.device), output_hidden_states=True)
        projected = output.get("text_embeds")
        return Encoded(
            tuple(states[0] for states in reversed(output.hidden_states)),
            None if projected is None else projected[0],
        )

    def normalize(self, states: Tensor) -> Tensor:
        """The final layer norm, which the last states need."""
        model = getattr(self.model, "text_model", self.model)
        return model.final_layer_norm(states)  # type: ignore[no-any-return]

    def _plain(self, text: str) -> list[int]:
        # Not `verbose`: it would warn of every text that is too long for the model.
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
def _splitter(placeholders: tuple[str, ...]) -> re.Pattern[str]:
    """Splits at whole placeholders, kept; "dog" is none in "dogma", and "<s>" is one in "a<s>b"."""

    def whole(placeholder: str) -> str:
        begin = r"(?<!\w)" if placeholder[0].isalnum() else ""
        end = r"(?!\w)" if placeholder[-1].isalnum() else ""
        return begin + re.escape(placeholder) + end

    longest_first = sorted(placeholders, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(whole, longest_first))})")
