"""New words for a subject (textual inversion, arXiv 2208.01618): vectors beside the vocabularies."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.words import BankEmbedding, Words
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.text import TextEncoder
from atelier_server.errors import InvalidRequest, Violation

_NOISE = 0.1  # of the vocabulary's standard deviation, around its mean


class Tokens:
    """`num_vectors` for each placeholder, in every text encoder of the base: one tensor [n,d] an encoder.

    They begin as the initializer token's embedding, all of them as in diffusers' textual_inversion.py;
    without one as the mean of the vocabulary with a little noise. Raises InvalidRequest for placeholders that
    are words already, and for an initializer token that is none.
    """

    def __init__(self, recipe: Recipe, base: BaseModel, bank: SlotBank) -> None:
        self._recipe = recipe
        self._bank = bank
        for encoder in base.encoders:
            _check(recipe, encoder)
        chance = torch.Generator().manual_seed(recipe.seed)
        self.vectors = {
            encoder.name: nn.Parameter(_first(recipe, encoder, bank.vocabulary(encoder.name), chance))
            for encoder in base.encoders
        }

    def parameters(self) -> dict[str, nn.Parameter]:
        return {f"tokens.{name}": vectors for name, vectors in self.vectors.items()}

    def words(self) -> Words:
        """For the texts of now, within their graph."""
        return self._bank.spoken({p: dict(self._of(p)) for p in self._recipe.placeholder_tokens})

    def canonical(self) -> dict[str, dict[str, Tensor]]:
        """Copies on the CPU: by placeholder, by encoder, each [num_vectors, d]."""
        return {
            placeholder: {
                encoder: vectors.detach().to("cpu", copy=True) for encoder, vectors in self._of(placeholder)
            }
            for placeholder in self._recipe.placeholder_tokens
        }

    def _of(self, placeholder: str) -> Iterator[tuple[str, Tensor]]:
        begin = self._recipe.placeholder_tokens.index(placeholder) * self._recipe.num_vectors
        for encoder, vectors in self.vectors.items():
            yield encoder, vectors[begin : begin + self._recipe.num_vectors]


def _check(recipe: Recipe, encoder: TextEncoder) -> None:
    vocabulary = encoder.tokenizer.get_vocab()
    violations = [
        Violation("recipe.placeholder_tokens", f"{placeholder!r} is a word of the base's vocabulary already")
        for placeholder in recipe.placeholder_tokens
        if placeholder in vocabulary or f"{placeholder}</w>" in vocabulary
    ]
    if not recipe.placeholder_tokens:
        violations.append(Violation("recipe.placeholder_tokens", "there is nothing to learn without one"))
    if recipe.initializer_token and len(encoder.ids(recipe.initializer_token)) != 1:
        described = f"{recipe.initializer_token!r} is not one token of the base's vocabulary"
        violations.append(Violation("recipe.initializer_token", described))
    if violations:
        raise InvalidRequest.of(violations)


def _first(
    recipe: Recipe, encoder: TextEncoder, vocabulary: BankEmbedding, chance: torch.Generator
) -> Tensor:
    """[n,d], float32 on the encoder's device."""
    count = len(recipe.placeholder_tokens) * recipe.num_vectors
    weight = vocabulary.weight.detach()
    if recipe.initializer_token:
        (known,) = encoder.ids(recipe.initializer_token)
        return weight[known].float().repeat(count, 1)
    noise = torch.randn(count, weight.shape[1], generator=chance).to(weight.device)
    return weight.float().mean(0) + _NOISE * weight.float().std() * noise
