"""Pivotal tuning: tokens for the first share of the steps, then weights around them.

The idea is that of arXiv 2106.05744, in the form that diffusers' train_dreambooth_lora_sdxl_advanced.py calls
`train_text_encoder_ti`; but one after the other: while tokens learn, weights do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor, nn

from atelier_server.adapters.bank import SlotBank
from atelier_server.adapters.canonical import CanonicalAdapter
from atelier_server.adapters.words import Words
from atelier_server.core import Recipe
from atelier_server.diffusion.base import BaseModel
from atelier_server.training.methods.method import NOTHING, Method
from atelier_server.training.methods.tokens import Tokens
from atelier_server.training.parts import Part, Phase


class Pivotal(Method):
    """Tokens, then `weights`: another method, whose steps begin where the tokens' end."""

    def __init__(self, recipe: Recipe, base: BaseModel, bank: SlotBank, weights: Method) -> None:
        super().__init__(recipe, weights.denoiser)
        self._base = base
        self._bank = bank
        self._weights = weights
        self.shares = weights.shares
        pivot = round(recipe.max_train_steps * recipe.train_text_encoder_ti_frac)
        phases = [Phase("tokens", ("tokens",), 0, pivot)]
        phases += [replace(phase, begin=max(pivot, phase.begin)) for phase in weights.phases]
        self.phases = [phase for phase in phases if phase.begin < phase.end]

    def begin(self) -> None:
        self._tokens = Tokens(self.recipe, self._base, self._bank)
        self._weights.begin()
        self.parts = [
            Part("tokens", self._tokens.parameters(), self.recipe.token_lr),
            *self._weights.parts,
        ]

    def enter(self, phase: Phase) -> None:
        """While tokens learn the weights are the base's: their forward is spared."""
        self._learns_tokens = "tokens" in phase.parts
        self.leaves = NOTHING if self._learns_tokens else self._weights.leaves
        self.text_leaves = NOTHING if self._learns_tokens else self._weights.text_leaves
        if not self._learns_tokens:
            self._weights.enter(phase)

    def words(self) -> Words:
        return self._tokens.words()

    def after_step(self, phase: Phase) -> None:
        if not self._learns_tokens:
            self._weights.after_step(phase)

    def adapter(self) -> CanonicalAdapter:
        learned = CanonicalAdapter({}) if self._learns_tokens else self._weights.adapter()
        return replace(learned, tokens=self._tokens.canonical())

    def extracting(self) -> Iterator[None]:
        if not self._learns_tokens:
            yield from self._weights.extracting()

    @property
    def kept_share(self) -> float | None:
        return None if self._learns_tokens else self._weights.kept_share

    @property
    def full_modules(self) -> Mapping[str, nn.Module]:
        return {} if self._learns_tokens else self._weights.full_modules

    def constants(self) -> Mapping[str, Tensor]:
        return self._weights.constants()

    def take_constants(self, constants: Mapping[str, Tensor]) -> None:
        self._weights.take_constants(constants)
