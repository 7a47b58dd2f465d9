"""A text encoder with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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

    def tokenize(self, text: str) -> Tensor:
        """Token ids [1, max_tokens]; what does not fit is cut off."""
        tokens = self.tokenizer(
            text, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
        )
        return tokens.input_ids  # type: ignore[no-any-return]

    @torch.no_grad()
    def encode(self, ids: Tensor) -> Encoded:
        """Of ids [1, tokens]."""
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
