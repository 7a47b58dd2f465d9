"""Textual inversion (arXiv 2208.01618): the base stays what it is, and learns new words."""

from __future__ import annotations

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.words import Words
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.diffusion.denoiser import Denoiser
from atelier_server.training.methods.method import Method
from atelier_server.training.methods.tokens import Tokens
from atelier_server.training.parts import Part, Phase


class TextualInversion(Method):
    """Vectors of tokens, and nothing else."""

    def __init__(self, recipe: Recipe, base: BaseModel, denoiser: Denoiser, bank: SlotBank) -> None:
        super().__init__(recipe, denoiser)
        self._base = base
        self._bank = bank
        self.phases = [Phase("tokens", ("tokens",), 0, recipe.max_train_steps)]

    def begin(self) -> None:
        self._tokens = Tokens(self.recipe, self._base, self._bank)
        self.parts = [Part("tokens", self._tokens.parameters(), self.recipe.token_lr)]

    def words(self) -> Words:
        return self._tokens.words()

    def adapter(self) -> CanonicalAdapter:
        return CanonicalAdapter({}, self._tokens.canonical())
